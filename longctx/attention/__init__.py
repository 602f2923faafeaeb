"""The mathematics of attention in pieces: torch only; no ranks, no configuration, no environment."""
