"""Who talks to whom: groups of ranks as values, the ring, Ulysses, and the strategies built from them."""
