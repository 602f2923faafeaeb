"""Seconds and bytes: arithmetic only, the same for the planner, the choice at run time and the reports."""
