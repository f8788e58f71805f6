"""An attention of a program as the choice of what runs it sees it: its kernel, its sizes, and what it shares."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from regraft.codegen.cpu.attention_masks import mask_key
from regraft.codegen.triton.attention_configs import Config
from regraft.codegen.triton.attention_decode import emit_decode
from regraft.codegen.triton.attention_layout import KeyLayout
from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported, site_spec
from regraft.codegen.triton.emit import Kernel, Origin, digest, dtype_name
from regraft.codegen.triton.tuning_records import SiteKey
from regraft.ir import ops
from regraft.ir.nodes import arguments, concrete, dtype, shape

#: Queries, and rows of queries and heads that share keys, up to which the keys are divided among programs.
MOST_DECODED_QUERIES, MOST_DECODED_ROWS = 16, 128
_DECODE = KeyLayout(packs_heads=True)
#: The operators that kernels are emitted for.
OPERATORS = (ops.attention, ops.attention_mapped)
_TENSORS = ("query", "key", "value", "bias", "slopes", "sinks")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one attention as numbers; symbolic ones are those of the example."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int

    @staticmethod
    def of(given: Mapping[str, Any]) -> Sizes:
        """The sizes of a site from its arguments."""
        batch, heads, queries, _ = (concrete(size) for size in shape(given["query"]))
        _, kv_heads, keys, _ = (concrete(size) for size in shape(given["key"]))
        return Sizes(batch, heads, kv_heads, queries, keys)

    @property
    def bucket(self) -> tuple[int, int, int, int, int]:
        """Batch and lengths rounded up to powers of two, as records are kept."""
        return (_rounded(self.batch), self.heads, self.kv_heads, _rounded(self.queries), _rounded(self.keys))


@dataclass(frozen=True)
class Site:
    """One attention. ``spec`` is that of its kernel, None where there is none for the ``reason``; ``decode``: its keys
    are divided among programs. ``alike``: so many sites of the program have its mask, and share what is made of it."""

    node: fx.Node
    given: dict[str, Any]
    spec: AttentionSpec | None
    decode: bool
    reason: str = ""
    alike: int = 1

    @property
    def key(self) -> SiteKey:
        """What a decision for it is kept under."""
        name = self._options() if self.spec is None else default_kernel(self.spec, self.decode).name
        return SiteKey(name, Sizes.of(self.given).bucket, dtype_name(dtype(self.given["query"])))

    def _options(self) -> str:
        """A name of a site without a kernel: all that is not a tensor, and the shapes of heads."""
        options = {name: str(value) for name, value in self.given.items() if name not in (*_TENSORS, "mask_tensors")}
        there = [name for name in _TENSORS if self.given.get(name) is not None]
        dims = [str(shape(self.given[name])[-1]) for name in ("query", "value")]
        return f"attention_{digest(repr((str(self.node.target), sorted(options.items()), there, dims)))}"


def sites_of(graph: fx.Graph) -> list[Site]:
    """The attentions of a graph, in order."""
    nodes = {node: arguments(node) for node in graph.nodes if node.target in OPERATORS}
    alike = Counter(mask_key(given) for given in nodes.values())
    found = []
    for node, given in nodes.items():
        try:
            spec = site_spec(given)
        except Unsupported as refusal:
            found.append(Site(node, given, None, False, str(refusal), alike[mask_key(given)]))
        else:
            found.append(Site(node, given, spec, is_decode(given, spec), alike=alike[mask_key(given)]))
    return found


def is_decode(given: dict[str, Any], spec: AttentionSpec) -> bool:
    """Whether a site has few queries and more keys; both kernels are right for any number."""
    sizes = Sizes.of(given)
    group = sizes.heads // max(1, sizes.kv_heads)
    few = sizes.queries <= MOST_DECODED_QUERIES and sizes.queries * group <= MOST_DECODED_ROWS
    return few and sizes.keys > sizes.queries and _DECODE.refuses(spec) is None


def emit_attention(
    spec: AttentionSpec, decode: bool, origins: tuple[Origin, ...] = (), tiles: Mapping[str, Config] | None = None
) -> Kernel:
    """The kernel of a spec, for many queries or for few."""
    if decode:
        return emit_decode(spec, origins=origins, tiles=tiles)
    return emit_prefill(spec, origins, tiles)


@functools.lru_cache(maxsize=256)
def default_kernel(spec: AttentionSpec, decode: bool) -> Kernel:
    """The kernel with its default tiles, whose name stands for the site in records."""
    return emit_attention(spec, decode)


def _rounded(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
