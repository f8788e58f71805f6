"""Row-wise regions of a graph: which calls one kernel holds, written out. Back ends make code of them."""
