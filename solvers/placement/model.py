"""The facts of a mixture-of-experts model that placement needs, and how they are read from a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.solvers.placement.errors import PlacementError

#: Names of one fact in the configs of different model families, in the order they are looked for.
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
_BYTES = {"fp8": 1, "int8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class MoeModel:
    """A model's expert layers.

    ``layer_ids`` are the true positions of the expert layers among all ``num_hidden_layers`` (DeepSeek-V3: 3 to 60 of
    61). ``num_groups`` is the number of router groups, 1 where the router knows none. Sizes are in bytes, work in
    floating point operations.
    """

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    num_hidden_layers: int
    num_groups: int = 1
    #: Bytes of one expert of one layer.
    expert_bytes: float = 44.0e6
    #: Bytes of one token copy sent to an expert's rank, and of the result sent back.
    dispatch_bytes: float = 7168.0
    combine_bytes: float = 14336.0
    #: Operations of one expert on one token.
    expert_flops: float = 88.0e6
    name: str = ""

    def __post_init__(self) -> None:
        if self.num_experts < 1 or not 1 <= self.top_k <= self.num_experts:
            raise PlacementError(
                f"a model of {self.num_experts} experts with top-{self.top_k} was given; "
                "expected at least one expert and 1 <= top_k <= experts"
            )
        if not self.layer_ids:
            raise PlacementError("a model without expert layers was given; expected at least one; check the layer ids")
        if list(self.layer_ids) != sorted(set(self.layer_ids)) or self.layer_ids[0] < 0:
            raise PlacementError(f"layer ids {self.layer_ids} were given; expected distinct ids in ascending order")
        if self.layer_ids[-1] >= self.num_hidden_layers:
            raise PlacementError(
                f"expert layer {self.layer_ids[-1]} was given for a model of {self.num_hidden_layers} layers; "
                "expected ids below that number; check num_hidden_layers"
            )
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise PlacementError(
                f"{self.num_groups} router groups were given for {self.num_experts} experts; "
                "expected a number of groups that divides the experts"
            )
        for what in ("expert_bytes", "dispatch_bytes", "combine_bytes", "expert_flops"):
            if not getattr(self, what) > 0:
                raise PlacementError(f"{what} of {getattr(self, what)} was given; expected a positive number")

    @property
    def num_layers(self) -> int:
        """How many layers have experts."""
        return len(self.layer_ids)

    @classmethod
    def simple(cls, num_layers: int, num_experts: int, top_k: int, **facts: Any) -> MoeModel:
        """A model whose every layer has experts."""
        return cls(num_experts, top_k, tuple(range(num_layers)), num_layers, **facts)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], weight_type: str = "bf16", token_type: str = "bf16") -> MoeModel:
        """Read a Hugging Face ``config.json``; types are the element types of weights and of dispatched tokens.

        Raises ``PlacementError`` where the config describes no expert layers.
        """
        text = config.get("text_config", config)
        experts, top_k = _first(text, _EXPERTS), _first(text, _TOP_K)
        hidden, layers = text.get("hidden_size"), text.get("num_hidden_layers")
        if not experts or not top_k or not hidden or not layers:
            raise PlacementError(
                "a config without expert layers was given; expected the number of experts, experts per token, "
                "hidden_size and num_hidden_layers; pass a mixture-of-experts model's config.json"
            )
        parameters = 3 * int(hidden) * int(_first(text, _EXPERT_WIDTH) or 4 * hidden)
        return cls(
            num_experts=int(experts),
            top_k=int(top_k),
            layer_ids=_expert_layers(text, int(layers)),
            num_hidden_layers=int(layers),
            num_groups=int(text.get("n_group") or 1),
            expert_bytes=float(parameters * _bytes(weight_type)),
            dispatch_bytes=float(int(hidden) * _bytes(token_type)),
            combine_bytes=float(int(hidden) * 2),
            expert_flops=float(2 * parameters),
            name=str(config.get("_name_or_path") or config.get("model_type") or ""),
        )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _bytes(element_type: str) -> int:
    if element_type not in _BYTES:
        raise PlacementError(f"element type {element_type!r} was given; expected one of {', '.join(_BYTES)}")
    return _BYTES[element_type]


def _expert_layers(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers left dense: the first few (DeepSeek), all but every n-th (Qwen), or listed ones."""
    first = int(config.get("first_k_dense_replace") or 0)
    frequency = int(config.get("moe_layer_freq") or 1) if isinstance(config.get("moe_layer_freq", 1), int) else 1
    step = int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    chosen = config.get("moe_layers")
    if chosen is not None:
        return tuple(sorted(int(layer) for layer in chosen))
    return tuple(
        layer
        for layer in range(first, layers)
        if layer not in dense and (layer + 1) % step == 0 and layer % frequency == 0
    )
