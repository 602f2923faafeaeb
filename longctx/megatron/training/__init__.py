"""Training on megatron-core: optimizer and schedule, checkpoints."""
