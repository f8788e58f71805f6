"""Row-wise regions (``codegen/rowwise``) as Triton kernels: emitted, and put into the graph in their place."""
