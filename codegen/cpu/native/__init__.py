"""Kernels of our own for the CPU: C++ that the machine's compiler builds once, and their launchers."""
