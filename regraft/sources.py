"""Models by name, for the command line: a ``.pt2`` file, a Hugging Face folder, or ``package.module:factory``."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from regraft.errors import SourceError
from regraft.ir.capture_error import first_line

_EXPECTED = "give a .pt2 file, a Hugging Face folder or package.module:factory"
_BATCH, _TOKENS = 2, 16


@dataclass(frozen=True)
class Source:
    """A model with example inputs; both empty where the source offers none."""

    model: nn.Module | ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def resolve(text: str, inputs: str | os.PathLike[str] | None = None) -> Source:
    """The model that ``text`` names, in eval mode, with example inputs.

    ``inputs`` is a safetensors file whose tensors take the place of the source's own examples: names are keyword
    inputs, "0", "1", … positions. Raises ``SourceError`` with one sentence for whatever is wrong.
    """
    path = Path(text)
    if text and path.is_dir():
        source = _from_folder(path)
    elif path.suffix == ".pt2" or path.is_file():
        source = _from_pt2(path)
    elif all(text.partition(":")):
        source = _from_factory(text)
    else:
        raise SourceError(f"there is no model {text!r}; {_EXPECTED}")
    if inputs is None:
        return source
    args, kwargs = read_inputs(inputs)
    return Source(source.model, args, kwargs)


def read_inputs(path: str | os.PathLike[str]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword inputs of a safetensors file; raises ``SourceError``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shown = os.fspath(path)
    try:
        held = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise SourceError(
            f"the inputs {shown} cannot be read ({first_line(error)}); give a "
            "file written by safetensors.torch.save_file"
        ) from error
    places = sorted(filter(str.isdecimal, held), key=int)
    if places != [str(place) for place in range(len(places))]:
        given = ", ".join(places)
        raise SourceError(f"the inputs {shown} have the positions {given}; number them 0, 1, … without a gap")
    named = {name: value for name, value in held.items() if not name.isdecimal()}
    return tuple(held[place] for place in places), named


def _from_pt2(path: Path) -> Source:
    if not path.is_file():
        raise SourceError(f"there is no file {path}; {_EXPECTED}")
    if path.suffix != ".pt2":
        raise SourceError(f"{path} is not a .pt2 file; {_EXPECTED}")
    log = logging.getLogger("torch.export")
    before = log.disabled
    log.disabled = True  # it would print the traceback of what our one sentence says
    try:
        exported = torch.export.load(path)
    except Exception as error:  # a broken file makes torch.export raise anything
        raise SourceError(
            f"{path} cannot be loaded ({first_line(error)}); write it with torch.export.save(exported_program, path)"
        ) from error
    finally:
        log.disabled = before
    args, kwargs = exported.example_inputs or ((), {})
    return Source(exported, tuple(args), dict(kwargs))


def _from_factory(text: str) -> Source:
    module_name, _, attribute = text.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:  # like `python -m`: what lies here can be named
        sys.path.insert(0, folder)
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except AttributeError as error:
        raise SourceError(
            f"the module {module_name} has no {attribute!r}; name a function in it that returns a model"
        ) from error
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise SourceError(f"{module_name} cannot be imported ({first_line(error)}); {_EXPECTED}") from error
    if isinstance(factory, (nn.Module, ExportedProgram)):
        return _source_of(text, factory)
    if not callable(factory):
        raise SourceError(f"{text} is a {type(factory).__name__}; name a function that returns a model")
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # so does the factory
        raise SourceError(
            f"{text} raised {first_line(error)}; it must return a model when called without arguments"
        ) from error
    return _source_of(text, made)


def _source_of(text: str, made: Any) -> Source:
    parts = made if isinstance(made, tuple) else (made,)
    padded: tuple[Any, ...] = (*parts, (), {})[:3] if len(parts) < 2 else (*parts, {})[:3]
    model, args, kwargs = padded[:3]
    if isinstance(args, Tensor):
        args = (args,)
    fits = isinstance(model, (nn.Module, ExportedProgram)) and isinstance(args, (tuple, list, dict))
    if len(parts) > 3 or not fits or not isinstance(kwargs, dict):
        shown = ", ".join(type(part).__name__ for part in parts)
        raise SourceError(f"{text} returned ({shown}); return model, (model, args) or (model, args, kwargs)")
    if isinstance(args, dict):
        kwargs = {**args, **kwargs}
        args = ()
    if isinstance(model, ExportedProgram) and not args and not kwargs and model.example_inputs is not None:
        args, kwargs = model.example_inputs
    return Source(_for_inference(model), tuple(args), dict(kwargs))


def _for_inference(model: Any) -> Any:
    return model.eval() if isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule) else model


def _from_folder(folder: Path) -> Source:
    config = _read_config(folder)
    if config is None:
        inner = _sentence_transformer(folder)
        if inner is None:
            raise SourceError(f"the folder {folder} has no config.json; {_EXPECTED}")
        return _from_folder(inner)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise SourceError(f"the folder {folder} has no weights; model.safetensors or a sharded index must be in it")
    try:
        import transformers
    except ImportError as error:
        raise SourceError(
            f"{folder} is a Hugging Face model, and transformers is not installed; pip install transformers"
        ) from error
    loader = _loader(transformers, config)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model = loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever it meets
        raise SourceError(
            f"transformers cannot load {folder} ({first_line(error)}); check that the folder is complete"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    return Source(model.eval(), (), _example(folder, model))


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({first_line(error)}); it must be a JSON object") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no JSON object; it must be the config of a Hugging Face model")
    return config


def _sentence_transformer(folder: Path) -> Path | None:
    """The folder of the transformer inside a sentence-transformers folder, which ``modules.json`` names."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        inner = folder / str(modules[0]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return inner if inner != folder and (inner / "config.json").is_file() else None


def _loader(transformers: Any, config: dict[str, Any]) -> Any:
    """The class that the config's ``architectures`` names, else ``AutoModel``."""
    for name in config.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def _example(folder: Path, model: Any) -> dict[str, Any]:
    """Inputs by what the model says it reads: pixels, or tokens with a mask."""
    config, main = model.config, getattr(model, "main_input_name", "input_ids")
    accepted = _parameters(model)
    generator = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", 224)
        height, width = (side, side) if isinstance(side, int) else (side[0], side[1])
        dtype = next(model.parameters()).dtype
        shape = (_BATCH, getattr(vision, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}
    if main != "input_ids":
        raise SourceError(
            f"{folder} reads {main!r}, for which regraft makes no example; give inputs as a safetensors file (--inputs)"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.randint(0, int(text.vocab_size), (_BATCH, _TOKENS), generator=generator)
    kwargs: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in accepted:
        kwargs["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids.clone()
    if getattr(text, "use_cache", False) and "use_cache" in accepted:
        kwargs["use_cache"] = False
    return kwargs


def _parameters(model: nn.Module) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)
