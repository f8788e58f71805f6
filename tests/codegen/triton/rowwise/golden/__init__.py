"""Emitted files as they should be."""
