"""Benchmarks, one file per subject; each measures its variants in turn in one run."""
