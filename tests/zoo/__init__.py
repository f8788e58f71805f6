"""Small models with random weights, one file a system, each written from its formula (docs/systems.md lists them)."""
