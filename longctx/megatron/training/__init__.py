"""Training with megatron-core: optimizer and learning-rate schedule, forward and backward pass, checkpoints."""
