"""Hugging Face tensors to and from megatron-core's parameters."""
