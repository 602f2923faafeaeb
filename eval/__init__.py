"""Accuracy of a model and of its variants: benchmarks, paired comparisons, a report."""
