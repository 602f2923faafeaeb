"""Benchmarks: a subject a file, each side by side in one run."""
