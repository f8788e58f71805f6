"""What the attention kernels of a spec share: the pieces of text that templates put together, and their parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from regraft.codegen.triton.attention_configs import padded
from regraft.codegen.triton.attention_layout import CONTIGUOUS, KeyLayout
from regraft.codegen.triton.attention_loops import BOUNDS
from regraft.codegen.triton.attention_spec import AttentionSpec, Unsupported, supports
from regraft.codegen.triton.emit import POINTER_KINDS, Parameter, dtype_name
from regraft.codegen.triton.mask_code import bounds_code, test_code
from regraft.codegen.triton.mask_operands import MaskOperand, mask_operands, reads_head
from regraft.codegen.triton.mask_terms import Term, everywhere, mask_terms
from regraft.codegen.triton.weights import WEIGHT_MAPS
from regraft.ir.mask import And, Everything

STRIDED = ("batch", "head", "row", "dim")
_PAIRS = ("batch", "head", "row", "key")
_INTERVAL = ["rows", "query_length", "key_length"]
NUMBERS = ("scale", "softcap")


@dataclass(frozen=True)
class _Interval:
    """A term of the mask in text: statements that narrow the interval, and what they read."""

    text: str
    lines: list[str]
    names: list[str]
    tests: bool


@dataclass(frozen=True)
class _Test:
    """A device function that tests pairs: its name, its expression, and the tensors that this reads."""

    name: str
    text: str
    masks: list[MaskOperand]


class AttentionParts:
    """The pieces of a spec's kernels; raises ``Unsupported`` where ``supports`` gives a reason. Kernels without
    ``values`` look at scores alone."""

    def __init__(self, spec: AttentionSpec, layout: KeyLayout = CONTIGUOUS, values: bool = True) -> None:
        reason = supports(spec) or layout.refuses(spec)
        if reason is not None:
            raise Unsupported(reason)
        self.spec, self.layout, self.values = spec, layout, values
        predicate = spec.predicate
        self.mask = mask_terms(predicate) if spec.mask_fill is None else everywhere(predicate)
        self.masks = mask_operands([predicate])
        self.exact = self.mask.exact and spec.mask_fill is None
        self._tests = [*(test for term in self.mask.terms for test in term.tests), *self.mask.tests]

    @property
    def terms(self) -> tuple[Term, ...]:
        """The intervals of the mask."""
        return self.mask.terms

    @property
    def optional(self) -> list[str]:
        """Operands beside query, key, value and the mask's tensors."""
        spec = self.spec
        held = (("bias", spec.bias != "none"), ("slopes", spec.slopes), ("sinks", spec.sinks))
        return [name for name, present in held if present]

    @property
    def _of_heads(self) -> list[str]:
        return [name for name in self.optional if name != "bias"]

    @property
    def tensors(self) -> list[str]:
        """The operator's tensors, in order."""
        masks = (mask.name for mask in self.masks)
        return ["query", "key", *(["value"] if self.values else []), *self.layout.tensors, *masks, *self.optional]

    @property
    def numbers(self) -> list[str]:
        """The operator's numbers."""
        return ["scale", *(["softcap"] if self.spec.softcap else [])]

    @property
    def state(self) -> list[str]:
        """What a step over a tile of keys carries on."""
        if self.spec.online:
            return ["acc", "total", "top"]
        return ["acc", "total"] if self.spec.normaliser.startswith("sum") else ["acc"]

    def operand_parameters(self) -> list[Parameter]:
        """Pointers of the mask's tensors and of bias, slopes and sinks."""
        found = [Parameter(mask.name, mask.kind, aligned=True) for mask in self.masks]
        element = POINTER_KINDS[self.spec.dtype]
        return found + [Parameter(name, element if name == "bias" else "*fp32", aligned=True) for name in self.optional]

    def operand_strides(self) -> list[Parameter]:
        """Strides of the mask's tensors and of the bias, and words of a row's bits."""
        found = [Parameter(f"{mask.name}_stride_{dim}", "i32") for mask in self.masks for dim in mask.dims]
        found += [Parameter(f"{mask.name}_words", "i32") for mask in self.masks if "bits" in mask.reads]
        if self.spec.bias != "none":
            found += [Parameter(f"bias_stride_{dim}", "i32") for dim in _PAIRS]
        return found

    def number_parameters(self) -> list[Parameter]:
        """Scale and softcap."""
        return [Parameter(name, "fp32") for name in self.numbers]

    def launch_value(self, name: str) -> str:
        """What the launcher gives for a kernel parameter."""
        tensor, mark, dim = name.partition("_stride_")
        if mark:
            dims = next((mask.dims for mask in self.masks if mask.name == tensor), None)
            dims = dims or {"bias": _PAIRS, "pages": ("batch", *self.layout.page_dims)}.get(tensor, STRIDED)
            return f"{tensor}.stride({dims.index(dim)})"
        return f"{name.removesuffix('_words')}.shape[2]" if name.endswith("_words") else name

    def unspecialized(self, *names: str) -> list[str]:
        """Integers that change from call to call, quoted: no variant is built for those that 16 divides."""
        strides = [f"{mask.name}_stride_batch" for mask in self.masks if "pairs" not in mask.reads]
        words = [f"{mask.name}_words" for mask in self.masks if "bits" in mask.reads]
        dims = () if self.layout.kind == "contiguous" else ("batch", *self.layout.page_dims[:-1])
        return [f'"{name}"' for name in (*names, *(f"pages_stride_{dim}" for dim in dims), *strides, *words)]

    def score_arguments(self) -> list[str]:
        """What the scores of a tile are made of beside ``query``, ``key``, ``keys`` and ``inside``."""
        spec = self.spec
        tested = self._tested_names()
        names = ["rows"] if spec.slopes or tested is not None else []
        if tested is not None:
            names += ["query_length", "key_length"]
        names += self.numbers
        if spec.bias != "none":
            names += ["bias_tile", "bias_stride_key"]
        if spec.slopes:
            names.append("slope")
        for place in range(len(self.terms)):
            names += [f"start_{place}", f"end_{place}"]
        return names + (tested or [])

    def _tested_names(self) -> list[str] | None:
        """What tests of pairs read beside indices and lengths; None where there is no test."""
        if not self._tests:
            return None
        names = [name for mask in mask_operands(self._tests) for name in mask.read_names()]
        return (["head"] if reads_head(self._tests) else []) + names

    def _test_values(self, names: list[str]) -> list[str]:
        """The same as ``step`` gives them: what there is one of a row as a column."""
        columns = {"head"} if self.layout.packs_heads else set()
        shaped = [f"{name}[:, None]" if name.endswith("_rows") or name in columns else name for name in names]
        return ["rows[:, None]", "keys[None, :]", "inside[None, :]", "query_length", "key_length", *shaped]

    def _test_functions(self) -> list[_Test]:
        """The device functions that test pairs: of a term, and of all."""
        named = [(f"test_{place}", term.tests) for place, term in enumerate(self.terms)] + [("test", self.mask.tests)]
        return [
            _Test(name, test_code(And(tests) if len(tests) > 1 else tests[0], device=True), mask_operands(tests))
            for name, tests in named
            if tests
        ]

    def names(self) -> dict[str, Any]:
        """The names that the templates read."""
        spec, weight, tested = self.spec, WEIGHT_MAPS[self.spec.weight], self._tested_names() or []
        functions = self._test_functions()
        lines = [line for term in self.terms for line in bounds_code(term.bounds)] + [test.text for test in functions]
        modified = spec.softcap or spec.slopes or spec.bias != "none" or spec.mask_fill is not None
        arguments = [*self.tensors, *self.numbers]
        return {
            "spec": spec,
            "layout": self.layout,
            "dtype": f"torch.{dtype_name(spec.dtype)}",
            "padded": padded,
            "plain": self.values and spec.online and not modified,
            "careful": spec.bias != "none" or spec.mask_fill is not None,
            "fill": _number(spec.mask_fill),
            "precision": ", input_precision=PRECISION" if spec.dtype == torch.float32 else "",
            "state": self.state,
            "masks": self.masks,
            "optional": self.optional,
            "terms": [self._interval(term) for term in self.terms],
            "bounds": [self._bound_names(place) for place in range(len(self.terms))],
            "tests": bool(self.mask.tests),
            "test_functions": functions,
            "test_names": ["rows", "keys", "inside", "query_length", "key_length", *tested],
            "test_values": self._test_values(tested),
            "values": self.values,
            "score_arguments": self.score_arguments(),
            "step_arguments": [
                *self.state,
                "query",
                "key_tile",
                "value_tile",
                "keys",
                "inside",
                *self.score_arguments(),
            ],
            "step_values": {"query": "queries"},
            "uses_floor_divide": any("floor_divide(" in text for text in lines),
            "weight_doc": weight.meaning,
            "weight_lines": weight.lines,
            "weight_reference": weight.reference,
            "argument_names": arguments,
            "parameters": [typed(name) for name in arguments],
            "checked": [*self.tensors[: 2 + self.values], *self.layout.tensors, *self._of_heads],
            "of_heads": self._of_heads,
            "returns": "tuple[Tensor, Tensor]" if spec.lse else "Tensor",
            **self._reference_names(),
        }

    def _bound_names(self, place: int) -> str:
        """Names for what ``tile_bounds`` gives; what no later line reads is a blank."""
        blank = len(self.terms) == 1 and (not self.exact or self.layout.packs_heads)
        names = [f"{bound}_{place}" for bound in BOUNDS]
        return ", ".join([names[0], "_", "_", names[3]] if blank else names)

    def _reference_names(self) -> dict[str, Any]:
        """What the reference computes first: only what its mask and slopes read."""
        spec = self.spec
        text = "" if isinstance(spec.predicate, Everything) else test_code(spec.predicate, device=False)
        if self.layout.pair_test:
            text = " & ".join([*([f"({text})"] if text else []), self.layout.pair_test])
        words = set(re.findall(r"\w+", text)) | ({"rows", "keys"} if spec.slopes else set())
        kinds: set[str] = set().union(*(mask.reads for mask in self.masks))
        return {
            "seen_text": text,
            "uses_rows": "rows" in words,
            "uses_keys": "keys" in words,
            "uses_head": "head" in words,
            "uses_query_length": bool(words & {"rows", "query_length"} or kinds & {"rows", "bits"}),
            "uses_key_length": bool("key_length" in words or kinds & {"keys", "bits"}),
            "uses_infinity": (bool(text) and spec.softmax and spec.mask_fill is None)
            or spec.lse
            or (spec.softmax and (spec.empty_rows != "nan" or spec.sinks)),
        }

    def _interval(self, term: Term) -> _Interval:
        names = ["head"] if reads_head(term.bounds) else []
        for mask in mask_operands(term.bounds):
            names += [f"{mask.name}_{how}" for how in sorted(mask.reads)]
        return _Interval(term.text, bounds_code(term.bounds), [*_INTERVAL, *names], bool(term.tests))


def typed(name: str) -> str:
    """An argument of the operator with its type."""
    return f"{name}: {'float' if name in NUMBERS else 'Tensor'}"


def _number(fill: float | None) -> str | None:
    """A fill as text. What is below fp32's lowest (of an fp64 model) is that; scores are fp32."""
    if fill is None:
        return None
    limit = torch.finfo(torch.float32)
    inside = max(limit.min, min(limit.max, fill))
    return repr(inside).replace("e+", "e") if not math.isinf(fill) else f'float("{fill}")'


def common_facts(spec: AttentionSpec) -> dict[str, str]:
    """What stands at the head of an attention kernel."""
    fill = "" if spec.mask_fill is None else f"; masked scores are {spec.mask_fill}"
    extras = [f"{spec.bias} bias"] if spec.bias != "none" else []
    extras += [name for name in ("slopes", "sinks", "softcap", "lse", "wide") if getattr(spec, name)]
    return {
        "element": f"{dtype_name(spec.dtype)}, head_dim {spec.head_dim}, value_dim {spec.value_dim}",
        "mask": f"{spec.mask}{fill}",
        "weights": f"{spec.weight}, normaliser {spec.normaliser}; a row without keys is {spec.empty_rows}",
        "with": ", ".join(extras),
    }
