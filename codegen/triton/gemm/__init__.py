"""Matrix products as Triton kernels: with what row-wise regions do before and behind them, and for routed experts."""
