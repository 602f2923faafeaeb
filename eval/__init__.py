"""What a change to a model costs in accuracy: benchmarks, paired comparisons, a report."""
