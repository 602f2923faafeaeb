"""Training: micro-batches of a mesh, the step, what is kept of it."""
