"""Accuracy of a model and of its variants: benchmarks, paired comparisons, a report."""

import recipes  # noqa: F401 -- it prints the first line while the other modules are imported
