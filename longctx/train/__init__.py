"""Training: shard batches over a mesh, run steps, measure them, track their figures, and stop early on request."""
