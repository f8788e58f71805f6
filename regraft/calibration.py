"""Calibration data: batches that fit what a model was compiled for, some of them held out."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sympy import Symbol  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils._pytree import tree_leaves

from regraft.build import Entry
from regraft.errors import SourceError
from regraft.guard import UnsupportedInput, describe_call, flatten_call
from regraft.passes.budget.errors import BudgetError
from regraft.sources import read_inputs

_MOST_BATCHES = 4096
_FEWEST_BATCHES = 2
_FEWEST_SAMPLES = 8  # in each of the two parts
_LONG = 64  # bytes of a sample from which on samples are not equal by chance


class Call(NamedTuple):
    """The inputs of one call of the model; a batch with positional and keyword inputs is given as one of these."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Calibration:
    """Calls to calibrate with, and calls held out."""

    calls: list[Call]
    held_out: list[Call]


def read_batches(calibration: Any) -> list[Call]:
    """The calls that ``calibration`` gives: an iterable of what ``compile`` takes as example inputs. Raises
    ``BudgetError`` for anything else."""
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise BudgetError(
            f"the calibration is a {type(calibration).__name__}; give a list of batches, each as the example inputs are"
        )
    calls: list[Call] = []
    for number, batch in enumerate(_drawn(calibration)):
        if isinstance(batch, Call):
            calls.append(batch)
        elif isinstance(batch, Tensor):
            calls.append(Call((batch,), {}))
        elif isinstance(batch, Mapping):
            wrong = [name for name in batch if not isinstance(name, str)]
            if wrong:
                raise BudgetError(
                    f"calibration batch {number} is a dict with the key {wrong[0]!r}; give the names of inputs as keys "
                    "(a model whose only input is a dict takes a tuple of it)"
                )
            calls.append(Call((), dict(batch)))
        elif isinstance(batch, (tuple, list)):
            calls.append(Call(tuple(batch), {}))
        else:
            raise BudgetError(
                f"calibration batch {number} is a {type(batch).__name__}; give a tensor, a tuple of positional inputs "
                "or a dict of keyword inputs"
            )
    return calls


def _drawn(calibration: Iterable[Any]) -> Iterator[Any]:
    """The batches, as many as are used; raises ``BudgetError`` where the user's iterable fails."""
    number = 0
    try:
        for batch in itertools.islice(calibration, _MOST_BATCHES):
            yield batch
            number += 1
    except Exception as error:  # an iterable may raise anything
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise BudgetError(f"the calibration failed at batch {number} ({type(error).__name__}: {said})") from error


def split(calls: list[Call], entry: Entry, seed: int) -> Calibration:
    """Half of the batches to calibrate with, half held out, drawn by ``seed``. Raises ``BudgetError`` where they do not
    fit what was compiled, or are too few."""
    if not calls:
        raise BudgetError("the calibration holds no batch; give at least two, better some hundred samples")
    for number, call in enumerate(calls):
        if not _fits(call, entry):
            given, wanted = describe_call(*call), describe_call(*entry.example)
            alike = ", in other containers or memory formats" if given == wanted else ""
            raise BudgetError(
                f"calibration batch {number} is {given}, and the model was compiled for {wanted}{alike}; give batches "
                "like that"
            )
    if len(calls) < _FEWEST_BATCHES:
        raise BudgetError("the calibration holds one batch; give at least two, one to calibrate with and one held out")
    _refuse_repeated(calls)
    _refuse_copies(calls)
    order = list(range(len(calls)))
    random.Random(seed).shuffle(order)
    half = len(order) // 2
    made = Calibration([calls[at] for at in sorted(order[half:])], [calls[at] for at in sorted(order[:half])])
    few = sum(map(samples_of, made.held_out))
    if few < _FEWEST_SAMPLES:
        raise BudgetError(
            f"the calibration holds {sum(map(samples_of, calls))} samples, of which {few} are held out; give at least "
            f"{_FEWEST_SAMPLES} to calibrate with and {_FEWEST_SAMPLES} held out"
        )
    return made


def _refuse_repeated(calls: list[Call]) -> None:
    """Raise ``BudgetError`` where two batches are the same memory: what is held out would have been calibrated with."""
    seen: dict[tuple[Any, ...], int] = {}
    for number, (args, kwargs) in enumerate(calls):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.numel()]
        places = tuple((value.data_ptr(), value.shape, value.stride()) for value in tensors)
        first = seen.setdefault(places, number)
        if places and first != number:
            raise BudgetError(
                f"calibration batches {first} and {number} are the same tensors; give each sample once, and copies of "
                "what is filled anew for each batch"
            )


def _refuse_copies(calls: list[Call]) -> None:
    """Raise ``BudgetError`` where most batches, or most samples of all, are copies of others, as of data that are gone
    through again. A few are what data may hold, and so are many where a sample is a few bytes."""
    batches = list(map(_contents, calls))
    samples = [sample for call in calls for sample in _of_each(call)]
    for what, held in (("batches", batches), ("samples", samples)):
        copies = len(held) - len(set(held))
        if copies and 2 * copies >= len(held):
            raise BudgetError(
                f"{copies} of {len(held)} calibration {what} hold the same numbers as others, so that what is held out "
                "would have been calibrated with; give each sample once"
            )


def _contents(call: Call) -> bytes:
    """A digest of all that a call is given."""
    digest = hashlib.blake2b()
    for value in _leaves(call):
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.digest()


def _of_each(call: Call) -> list[bytes]:
    """A digest of each sample, its rows of all tensors that have one for each; none where those are short."""
    number = samples_of(call)
    rows = [value for value in _leaves(call) if isinstance(value, Tensor) and value.dim() and len(value) == number]
    if sum(value[:1].nbytes for value in rows) < _LONG:
        return []
    return [hashlib.blake2b(b"".join(_bytes(value[at]) for value in rows)).digest() for at in range(number)]


def _leaves(call: Call) -> list[Any]:
    return tree_leaves((call.args, dict(sorted(call.kwargs.items()))))


def _bytes(value: Tensor) -> bytes:
    """Type, shape and numbers of a tensor."""
    numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{value.dtype}{list(value.shape)}".encode() + numbers.tobytes()


def covered(calls: list[Call], entry: Entry) -> dict[Symbol, tuple[int, int]]:
    """The smallest and the largest that calls which fit have of each symbolic size: of code with symbolic sizes, the
    loss was measured there only. The number of samples, dim 0, is left out: the loss is a mean over them. Raises
    ``BudgetError`` where the example inputs lie outside."""
    inner = entry.guard.inner_sizes()
    found = [entry.guard.sizes(leaves_of(call, entry)) or {} for call in calls]
    ranges = {symbol: [int(sizes[symbol]) for sizes in found if symbol in sizes] for symbol in inner}
    made = {symbol: (min(sizes), max(sizes)) for symbol, sizes in ranges.items() if sizes}
    own = entry.guard.sizes(list(entry.program.example)) or {}
    for symbol, (least, most) in made.items():
        if not least <= own.get(symbol, least) <= most:
            raise BudgetError(
                f"the calibration has sizes from {least} to {most} in {entry.guard.place_of(symbol)}, and the example "
                f"inputs have {own[symbol]}; give batches of that size, too"
            )
    return made


def stored_batches(path: Path, example: Call) -> list[Call]:
    """Batches from a folder of safetensors files, one each in the order of their names, or from one file of many
    samples, cut to batches of the example's size; samples that are left over are not used. Raises ``SourceError``."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise SourceError(
                f"the folder {path} holds no safetensors file; give one for each batch, or one file of all"
            )
        return [_stored(file, example) for file in files]
    args, kwargs = _stored(path, example)
    size, number = samples_of(example), samples_of(Call(args, kwargs))

    def cut(value: Tensor, at: int) -> Tensor:
        return value[at : at + size] if value.dim() and len(value) == number else value

    return [
        Call(tuple(cut(value, at) for value in args), {name: cut(value, at) for name, value in kwargs.items()})
        for at in range(0, number - size + 1, size)
    ]


def _stored(path: Path, example: Call) -> Call:
    """The inputs in a file. Raises ``SourceError`` where they have other names than those of the model."""
    held = Call(*read_inputs(path))
    given, wanted = ([*map(str, range(len(args))), *sorted(kwargs)] for args, kwargs in (held, example))
    if given != wanted:
        raise SourceError(
            f"{path} holds the inputs {', '.join(given) or 'none'}, and the model takes {', '.join(wanted)}; name them "
            "so (0, 1, … are positional inputs)"
        )
    return held


def samples_of(call: Call) -> int:
    """The first dim of the first tensor that has one, however deep it lies; one of 1 is spread over the samples."""
    sizes = [int(value.shape[0]) for value in tree_leaves(tuple(call)) if isinstance(value, Tensor) and value.dim() > 0]
    return next((size for size in sizes if size != 1), 1)


def leaves_of(call: Call, entry: Entry) -> list[Any]:
    """The leaves of a call in the order of the compiled program."""
    args, kwargs = call
    return entry.ordered(flatten_call(args, dict(sorted(kwargs.items())))[1])


def _fits(call: Call, entry: Entry) -> bool:
    args, kwargs = call
    try:
        structure, leaves = flatten_call(args, dict(sorted(kwargs.items())))
    except UnsupportedInput:
        return False
    return structure == entry.structure and entry.guard.fits(entry.ordered(leaves))
