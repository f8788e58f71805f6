"""What every rank of ``test_shard.py`` runs under torchrun: models whose attention is sharded, beside themselves. The
errors of the cases that are named lie in ``FOLDER/<rank>.json``."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import regraft
from regraft.build import Toolchain
from regraft.ir.verify import relative_l2
from regraft.passes.attention.shard import ShardAttention
from regraft.passes.pipeline import default_pipeline


class Attention(nn.Module):
    """Four query heads on two of keys and values; ``sinks`` are logits that take weight and give nothing."""

    def __init__(self, causal: bool = False, sinks: bool = False) -> None:
        super().__init__()
        self.causal, self.sinks = causal, nn.Parameter(torch.randn(4)) if sinks else None
        self.query, self.key, self.value, self.out = (nn.Linear(32, width) for width in (32, 16, 16, 32))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        length = x.shape[1]
        query, key, value = (
            layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
        if self.causal:
            scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
        if padding is not None:
            scores = scores.masked_fill(~padding[:, None, None].bool(), torch.finfo(torch.float32).min)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., :length]
        return self.out((weights @ value.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


def models() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Grouped queries under a causal mask, with padding, and with sinks."""
    torch.manual_seed(0)
    x, padding = torch.randn(2, 11, 32), torch.ones(2, 11, dtype=torch.int64)
    padding[1, 7:] = 0
    return {
        "causal": (Attention(causal=True).eval(), {"x": x}),
        "padding": (Attention().eval(), {"x": x, "padding": padding}),
        "sinks": (Attention(causal=True, sinks=True).eval(), {"x": x}),
    }


def error(model: nn.Module, inputs: dict[str, Tensor], by: str) -> dict[str, Any]:
    """Relative L2 of the sharded model's output, and how many of its attentions are sharded."""
    how = ShardAttention(dist.get_world_size(), dist.get_rank(), by)
    toolchain = Toolchain(pipeline=lambda target: default_pipeline(target, tokens=(how,)))
    fast = regraft.compile(model, kwargs=inputs, toolchain=toolchain)
    with torch.no_grad():
        wanted = model(**inputs)
    gathers = [node for node in fast.entries[0].program.graph.nodes if "gather" in str(node.target)]
    return {"error": relative_l2(fast(**inputs), wanted), "sharded": len(gathers)}


def main() -> None:
    """All cases on this rank."""
    logging.getLogger("regraft").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = models()
    found = {f"{name} {by}": error(*cases[name], by) for name in sys.argv[2:] for by in ("heads", "keys")}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
