"""Kernels for GPUs, emitted as readable Triton files; built and checked without a GPU."""
