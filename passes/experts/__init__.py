"""Placement of experts as an exact permutation: expert weights, router rows and all that lies along the expert axis."""
