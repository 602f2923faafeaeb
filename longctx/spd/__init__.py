"""Sync-Point-Drop (arXiv 2502.20727): which blocks leave out a reduction, what that costs, how it is repaired."""
