"""Device functions that emitted kernels call where Triton has none, as text."""

from __future__ import annotations

#: Name -> its text. Those that a function calls stand before it.
HELPERS: dict[str, str] = {
    "row_max": '''
def row_max(values):
    """The largest number of each row; NaN where the row holds one."""
    odd = tl.max((values != values).to(tl.int32), 1, keep_dims=True) > 0
    return tl.where(odd, float("nan"), tl.max(values, 1, keep_dims=True))
''',
    "row_min": '''
def row_min(values):
    """The smallest number of each row; NaN where the row holds one."""
    odd = tl.max((values != values).to(tl.int32), 1, keep_dims=True) > 0
    return tl.where(odd, float("nan"), tl.min(values, 1, keep_dims=True))
''',
    "clamp": '''
def clamp(x, lowest, highest):
    """Numbers between two bounds; what is no number stays."""
    raised = tl.maximum(x, lowest, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, highest, propagate_nan=tl.PropagateNan.ALL)
''',
    "tanh": '''
def tanh(x):
    """Hyperbolic tangent; a polynomial near zero, where the exponentials would cancel."""
    square = x * x
    series = (((-0.00627637985 * square + 0.0211162077) * square - 0.0538751365) * square + 0.13332924) * square
    small = x + x * square * (series - 0.333333304)
    shrunk = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0.0, -large, large))
''',
    "expm1": '''
def expm1(x):
    """exp(x) - 1, also near zero, where the rounding of the exponential is divided out (Kahan)."""
    raised = tl.exp(x)
    near = (raised - 1.0) * (x / tl.log(raised))
    return tl.where(raised == 1.0, x, tl.where(tl.abs(x) < 0.5, near, raised - 1.0))
''',
    "log1p": '''
def log1p(x):
    """log(1 + x), also near zero, where the rounding of the sum is divided out (Kahan)."""
    sum = 1.0 + x
    near = tl.log(sum) * (x / (sum - 1.0))
    return tl.where(sum == 1.0, x, tl.where(tl.abs(x) < 0.5, near, tl.log(sum)))
''',
    "softplus": '''
def softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(tl.exp(-tl.abs(x)))
''',
    "gelu": '''
def gelu(x):
    """x times the probability that a normal number is below x."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
''',
    "gelu_tanh": '''
def gelu_tanh(x):
    """The approximation of gelu by a hyperbolic tangent."""
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
''',
}


def helper_text(names: set[str]) -> str:
    """The definitions of device functions, each with its decorator, in a fixed order."""
    return "\n\n\n".join(f"@triton.jit\n{text.strip()}" for name, text in HELPERS.items() if name in names)
