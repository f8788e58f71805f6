"""The placements that others use, to compare with and to start from."""
