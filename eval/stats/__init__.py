"""Outcomes of answers, paired comparisons and the report."""
