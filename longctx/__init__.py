"""Long-context transformers on megatron-core: exact context parallelism that runs anywhere."""

__version__ = "0.2.0"
