"""Row-wise regions of a graph as Triton kernels: found, emitted, and put into the graph in their place."""
