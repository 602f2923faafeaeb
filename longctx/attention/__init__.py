"""The mathematics of block-wise attention. Uses torch only: no ranks, no configuration, no environment."""
