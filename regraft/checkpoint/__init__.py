"""Checkpoints on disk: safetensors files read and written piece by piece, never a model in memory."""
