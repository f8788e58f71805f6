"""The solver ``auto``: replicas, balance, co-activation, inter-layer affinity, and local search over all of them."""
