"""Token reduction as Triton kernels: a plan and a merge are one launch each, and so are tokens put back."""
