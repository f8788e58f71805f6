"""Maps from scores to weights that need no shift, as text for the kernel and for its reference (attention.md 3.1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightMap:
    """``lines`` are the body of the device function of ``scores``; ``reference`` an expression of PyTorch."""

    meaning: str
    lines: tuple[str, ...]
    reference: str


WEIGHT_MAPS = {
    "exp": WeightMap("exp(s)", (), "scores.exp()"),
    "sigmoid": WeightMap("1 / (1 + exp(-s))", ("return tl.sigmoid(scores)",), "scores.sigmoid()"),
    "relu": WeightMap("max(s, 0)", ("return tl.maximum(scores, 0.0)",), "scores.relu()"),
    "elu1": WeightMap(
        "elu(s) + 1",
        (
            "negative = tl.math.exp2(tl.minimum(scores, 0.0) * LOG2E)",
            "return tl.where(scores > 0.0, scores + 1.0, negative)",
        ),
        "torch.nn.functional.elu(scores) + 1",
    ),
    "gelu": WeightMap(
        "s * P(normal <= s)",
        ("return 0.5 * scores * (1.0 + tl.math.erf(scores * 0.7071067811865476))",),
        "torch.nn.functional.gelu(scores)",
    ),
    "identity": WeightMap("s", ("return scores",), "scores"),
}
