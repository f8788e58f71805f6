"""Emitted kernels: a readable Python file each, with where it comes from at its head; the same text for the same spec.

The text is made of ``templates/*.j2``. A file stands alone: it needs torch and triton, nothing of regraft.
"""

from __future__ import annotations

import functools
import hashlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import fx

from regraft.ir.nodes import user_line

_TEMPLATES = Path(__file__).parent / "templates"
_WIDTH = 116
_LINE = 120
_HEADER = 6  # sites named at the head of a file that many use


@dataclass(frozen=True)
class Origin:
    """Where a kernel comes from: the rewrites that made its node, the node, and the user's line."""

    rules: tuple[str, ...] = ()
    node: str = ""
    line: str = ""

    @staticmethod
    def of(node: fx.Node) -> Origin:
        """The origin of a node of a rewritten graph."""
        return Origin(tuple(node.meta.get("provenance", ())), node.name, user_line(node))


@dataclass(frozen=True)
class Parameter:
    """A runtime parameter of a kernel in Triton's words: "*fp16", "i32", "fp32"; ``value`` where it is known to be one
    number in every build (a stride of 1), ``aligned`` where 16 divides it in the models that builds are for."""

    name: str
    kind: str
    value: int | None = None
    aligned: bool = False


@dataclass(frozen=True)
class Entry:
    """A jitted function of an emitted file. ``sizes`` are the names of its compile-time sizes, and ``configs`` their
    values with warps and stages, for each architecture."""

    name: str
    parameters: tuple[Parameter, ...]
    sizes: tuple[str, ...]
    configs: Mapping[str, tuple[int, ...]] = field(hash=False)


@dataclass(frozen=True)
class Kernel:
    """An emitted file: its text, the functions that run on the device, and the operator's arguments in order."""

    name: str
    source: str
    entries: tuple[Entry, ...]
    operands: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The first of a sha256 of the text: what a cache or a tuning record is kept under."""
        return digest(self.source)


def digest(text: str, length: int = 16) -> str:
    """Hexadecimal digits of a sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def render(template: str, **names: Any) -> str:
    """A template's text, without blanks at line ends and with one line end at its own."""
    text = _environment().get_template(template).render(**names)
    stripped = "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"
    return re.sub(r"\n{3,}(?= )", "\n\n", stripped)  # inside a function one line is enough


def header(title: str, facts: Mapping[str, str], origins: tuple[Origin, ...]) -> str:
    """The docstring of an emitted file: what it computes, what it was emitted for, and where that came from."""
    lines = [title, "", "Emitted by regraft: `regraft kernels` writes it again.", ""]
    width = max(map(len, [*facts, "source"])) + 2
    for name, text in facts.items():
        lines += _fact(name, text, width)
    for origin in origins[:_HEADER]:
        lines += _fact("node", origin.node, width)
        lines += _fact("source", origin.line, width)
        for rule in origin.rules:
            lines += _fact("rule", rule, width)
    if len(origins) > _HEADER:
        lines.append(f"and {len(origins) - _HEADER} more sites")
    text = "\n".join(line.rstrip().replace("\\", "/").replace('"""', "'''") for line in lines)
    return f'"""{text}\n"""\n\n'


def _fact(name: str, text: str, width: int) -> list[str]:
    if not text:
        return []
    return textwrap.wrap(text, _WIDTH, initial_indent=name.ljust(width), subsequent_indent=" " * width)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" of ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


#: Element types as Triton's signatures name them; booleans are read as bytes.
POINTER_KINDS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bool: "*u8",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"fit": fit, "fit_test": fit_test, "fit_docstring": fit_docstring}
    environment.globals |= {"jitted": jitted, "indented": indented}
    return environment


def jitted(unspecialized: Sequence[str]) -> str:
    """The decorator of a kernel with the parameters that no variant is built for."""
    listed = f"do_not_specialize=[{', '.join(unspecialized)}]"
    if len(listed) <= _LINE - len("@triton.jit()"):
        return f"@triton.jit({listed})"
    if len(listed) <= _LINE - 4:
        return f"@triton.jit(\n    {listed}\n)"
    names = "".join(f"        {name},\n" for name in unspecialized)
    return f"@triton.jit(\n    do_not_specialize=[\n{names}    ]\n)"


def indented(text: str, blanks: int) -> str:
    """Lines further in."""
    return textwrap.indent(text, " " * blanks)


def fit_test(opening: str, name: str, text: str, indent: int = 4) -> str:
    """A statement with a boolean expression behind it ("return", "seen ="); a long one is put together under ``name``,
    an operand a line."""
    blanks = " " * indent
    if len(f"{blanks}{opening} {text}") <= _LINE:
        return f"{blanks}{opening} {text}"
    mark, operands = _operands(text)
    lines = [f"{name} = {_bare(operands[0])}", *(f"{name} = {name} {mark} {operand}" for operand in operands[1:])]
    if opening == "return":
        lines.append(f"return {name}")
    return "\n".join(f"{blanks}{line}" for line in lines)


def _operands(text: str) -> tuple[str, list[str]]:
    """What an expression joins outside of parentheses, all by "&" or all by "|"."""
    depth, start, found, marks = 0, 0, [], []
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and letter in "&|":
            found.append(text[start:place].strip())
            marks.append(letter)
            start = place + 1
    assert len(set(marks)) <= 1, f"operands of both kinds without parentheses: {text}"
    return (marks or ["&"])[0], [*found, text[start:].strip()]


def _bare(text: str) -> str:
    """An expression without parentheses around the whole of it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[1:-1] if letter == ")" and place == len(text) - 1 and text.startswith("(") else text
    return text


def fit_docstring(text: str, indent: int = 4) -> str:
    """A docstring: one line where it fits, else several."""
    blanks = " " * indent
    if len(text) + indent + 6 <= _LINE:
        return f'{blanks}"""{text}"""'
    lines = textwrap.wrap(f'"""{text}', _LINE, initial_indent=blanks, subsequent_indent=blanks)
    return "\n".join([*lines, f'{blanks}"""'])


def fit(opening: str, items: Sequence[str], closing: str, indent: int = 0) -> str:
    """A definition or a call: one line where it fits, else an item a line."""
    blanks = " " * indent
    joined = ", ".join(items)
    if len(f"{blanks}{opening}{joined}{closing}") <= _LINE:
        return f"{blanks}{opening}{joined}{closing}"
    if len(joined) + indent + 4 <= _LINE and not closing.endswith(":"):
        return f"{blanks}{opening}\n{blanks}    {joined}\n{blanks}{closing}"
    return "\n".join([f"{blanks}{opening}", *(f"{blanks}    {item}," for item in items), f"{blanks}{closing}"])
