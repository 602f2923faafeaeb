"""Sync-Point-Drop on megatron-core's layers: the block, its repair, its measurements."""
