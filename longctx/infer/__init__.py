"""Inference: a sharded KV cache, prefill, decoding."""
