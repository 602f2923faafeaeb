"""Training: shard batches over a mesh, run and measure steps, track metrics, and stop early on request."""
