"""Sync-Point-Drop (arXiv 2502.20727): choose blocks that skip a reduction, measure the cost, repair the weights."""
