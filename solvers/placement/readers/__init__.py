"""Readers of routing traces, one file a format."""
