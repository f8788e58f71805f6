"""``regraft record``: a routing trace of a model with expert blocks, from texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import toolbox
from regraft.cli.common import JsonOption, ModelArgument, Refused, UsageFault, check_output, emit, guard, progress

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.record import Recorder
    from regraft.sources import Source

_SUFFIXES = (".npz", ".safetensors")


def record(
    model: ModelArgument,
    texts: Annotated[Path, typer.Option("--texts", help="A text file; it is cut into windows of --length tokens.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The trace to write, .npz or .safetensors.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="A Hugging Face folder; by default the model's own.")
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a sequence.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences of a call.")] = 2,
    scenario: Annotated[str, typer.Option("--scenario", help="A name for what the texts are: domain, tenant…")] = "all",
    as_json: JsonOption = False,
) -> None:
    """Record which experts the tokens of texts choose in each layer."""
    with guard(as_json):
        check_output(output, keep=(texts, tokenizer))
        if output.suffix not in _SUFFIXES:
            raise UsageFault(f"{output} is no name of a trace; give one that ends in {' or '.join(_SUFFIXES)}")
        from regraft.record import Recorder, windows
        from regraft.solvers.placement.readers.native import write_trace

        folder = tokenizer if tokenizer is not None else Path(model)
        calls = list(windows(_tokens(texts, folder), batch, length))
        source = toolbox.resolve(model)
        with progress(f"recording {model}", as_json, total=len(calls)) as step:
            recorder = Recorder(toolbox.capture(_with_ids(source, calls[0])), calls[0])
            batches = []
            for ids in calls:
                batches.append(_batch(recorder, ids, scenario))
                step()
        trace = recorder.trace(batches, _num_hidden_layers(source), _name(source))
        write_trace(trace, output)
        facts = {
            "output": str(output),
            "num_experts": trace.num_experts,
            "top_k": trace.top_k,
            "layer_ids": list(trace.layer_ids),
            "batches": len(batches),
            "tokens": sum(item.num_tokens or 0 for item in batches),
        }
        emit(as_json, lambda: facts, lambda: _text(facts))


def _batch(recorder: Recorder, ids: Tensor, scenario: str) -> Any:
    from regraft.solvers.placement.errors import PlacementError

    try:
        return recorder.batch(ids, scenario=scenario)
    except PlacementError as error:
        raise Refused(f"the model's routing is no trace: {error}") from error


def _tokens(texts: Path, folder: Path) -> list[int]:
    """The token ids of a text file."""
    try:
        text = texts.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageFault(f"the texts {texts} cannot be read ({error}); give a text file in UTF-8") from error
    if not folder.is_dir():
        raise UsageFault(f"{folder} is no folder with a tokenizer; name one with --tokenizer")
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # whatever is wrong with its files
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise UsageFault(f"no tokenizer can be had from {folder} ({said}); name one with --tokenizer") from error
    return list(found(text)["input_ids"])


def _with_ids(source: Source, ids: Tensor) -> Source:
    """The source with token ids in the place of its own; no padding, and options such as ``use_cache`` as they were."""
    import torch

    from regraft.sources import Source

    if not source.kwargs:
        return Source(source.model, (ids, *source.args[1:]))
    options = {name: value for name, value in source.kwargs.items() if not isinstance(value, torch.Tensor)}
    return Source(source.model, source.args, {"input_ids": ids, **options})


def _num_hidden_layers(source: Source) -> int:
    return int(getattr(getattr(source.model, "config", None), "num_hidden_layers", 0) or 0)


def _name(source: Source) -> str:
    return type(source.model).__name__


def _text(facts: dict[str, Any]) -> str:
    layers = json.dumps(facts["layer_ids"])
    return (
        f"wrote {facts['output']}: {facts['tokens']} tokens in {facts['batches']} batches, {facts['top_k']} of "
        f"{facts['num_experts']} experts each, layers {layers}"
    )
