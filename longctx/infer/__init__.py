"""Inference: the sharded KV cache, prefill, decoding, and sessions of several turns."""
