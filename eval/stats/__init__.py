"""From answers to outcomes, comparisons and the report."""
