"""Communication: groups of ranks, ring attention, Ulysses, their composition, and the launch of ranks."""
