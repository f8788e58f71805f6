"""Where keys and values lie: in one piece, in pages of a cache, or at listed places."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.mask_operands import mask_operands

KINDS = ("contiguous", "paged", "indexed")


@dataclass(frozen=True)
class KeyLayout:
    """How a kernel finds the keys of a batch and head.

    - "contiguous": ``key`` is ``[batch, kv_heads, keys, head_dim]`` with any strides.
    - "paged": ``key`` is ``[pages, kv_heads, page_size, head_dim]``; ``pages`` ``[batch, count]`` says which page holds
      the next ``page_size`` keys, and ``lengths`` ``[batch]`` how many keys there are. ``key_len`` in the mask is a
      batch's own length.
    - "indexed": ``key`` is contiguous, and only the blocks of ``page_size`` keys that ``pages`` ``[batch, kv_heads,
      count]`` lists are read (selected blocks or keys: TidalDecode, Quest, NSA); -1 lists nothing, and no block twice.

    ``packs_heads``: the heads that share keys are rows of one tile (decoding).
    """

    kind: str = "contiguous"
    page_size: int = 0
    packs_heads: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the layout of keys is {self.kind!r}, and {', '.join(KINDS)} are known")
        if self.kind != "contiguous" and self.page_size < 1:
            raise ValueError(f"a page of {self.page_size} keys: expected at least one")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Operands beside query, key and value."""
        return {"contiguous": (), "paged": ("pages", "lengths"), "indexed": ("pages",)}[self.kind]

    @property
    def page_dims(self) -> tuple[str, ...]:
        """Dims of ``pages`` behind the batch, in the names of its strides."""
        return ("head", "entry") if self.kind == "indexed" else ("entry",)

    @property
    def pair_test(self) -> str:
        """What the reference tests beside the mask, in text: a batch's own length, or which keys are listed."""
        return {
            "contiguous": "",
            "paged": "(keys < key_length)",
            "indexed": "listed(pages, key.shape[2]).repeat_interleave(group, 1)",
        }[self.kind]

    def refuses(self, spec: AttentionSpec) -> str | None:
        """Why no kernel is emitted for a spec with keys that lie so; None where one is."""
        if not self.packs_heads:
            return None
        if spec.empty_rows == "mean" and spec.softmax and not spec.sinks:
            return "decoding does not read the keys that a row without keys would average"
        if self.kind == "paged":
            if spec.bias != "none":
                return "keys in pages have no bias"
            if any(mask.reads & {"keys", "pairs"} for mask in mask_operands([spec.predicate])):
                return f"the mask {spec.mask} reads a tensor of keys, and keys in pages have none"
        return "masked scores keep a value, but unlisted keys have none" if self._drops(spec) else None

    def _drops(self, spec: AttentionSpec) -> bool:
        return self.kind == "indexed" and spec.mask_fill is not None


CONTIGUOUS = KeyLayout()
