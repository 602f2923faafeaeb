"""Sync-Point-Drop on megatron-core's layers: the block with one reduction, its repair, and its measurements."""
