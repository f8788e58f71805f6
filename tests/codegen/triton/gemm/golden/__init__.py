"""Emitted kernels as text: what the emitter must write."""
