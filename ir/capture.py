"""Capture: a model becomes a pure graph, by ``torch.export`` in non-strict mode.

What comes out is a ``Program``: nothing in it mutates, no region is left in it, every node has its fake value,
weights are the model's own tensors. Training behaviour is refused by what the graph does, not by a flag: a dropout
that drops, a batch norm that takes its statistics from the batch.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map

from regraft.ir.capture_dynamic import (
    call_signature,
    check_symbols,
    dynamic_shapes,
    settle_equal_sizes,
    spelled_keywords,
)
from regraft.ir.capture_error import CaptureError, first_line, unknown_output, why_not_traced
from regraft.ir.capture_hints import as_if_not_compiled, masks_as_given
from regraft.ir.capture_imports import export_trace
from regraft.ir.capture_in_place import write_functional
from regraft.ir.capture_negated import write_out_negated
from regraft.ir.capture_regions import complete_values, inline_regions, must_decompose, refuse_left_over
from regraft.ir.capture_speed import faster_export, resting_collector
from regraft.ir.capture_state import ModelState, Notes, reads_layout, settle
from regraft.ir.memory import drop_cycles
from regraft.ir.nodes import arguments, user_line
from regraft.ir.program import Program

__all__ = ["CaptureError", "capture", "from_exported", "inline_regions"]

_LOG = logging.getLogger("regraft")
_ATEN = torch.ops.aten
#: Operator -> the argument that is true (or positive) only in training.
_TRAINING_ARGUMENTS = {
    _ATEN.dropout.default: "train",
    _ATEN.alpha_dropout.default: "train",
    _ATEN.feature_dropout.default: "train",
    _ATEN.feature_alpha_dropout.default: "train",
    _ATEN.native_dropout.default: "train",
    _ATEN.rrelu.default: "training",
    _ATEN.batch_norm.default: "training",
    _ATEN.scaled_dot_product_attention.default: "dropout_p",
}


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
) -> Program:
    """The program of ``model`` at the example inputs ``args`` and ``kwargs``.

    ``model`` is a module, a ``GraphModule`` or an ``ExportedProgram`` (whose own example inputs serve when none
    are given; it is not changed). ``dynamic`` is None for the example's sizes, True for symbolic ones wherever the
    model allows, or a ``torch.export`` specification. Raises ``CaptureError``, with torch's exception as its
    cause.
    """
    kwargs = dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return _of_exported(model, args, kwargs, dynamic)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"a {type(model).__name__} was given as the model; give an nn.Module, an ExportedProgram or a GraphModule"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a ScriptModule was given, which is no Python any more; give the nn.Module it was made of")
    _refuse_layouts(args, kwargs)
    inputs = _bound(model, args, kwargs)
    if isinstance(model, fx.GraphModule):
        kwargs = {name: kwargs[name] for name in inputs if name in kwargs}  # export passes them on by position
    shapes = dynamic_shapes(dynamic, inputs)
    with contextlib.nullcontext() if shapes is None else spelled_keywords(model, kwargs):
        exported, notes = _export(model, args, kwargs, shapes)
    drop_cycles()
    if must_decompose(exported.graph_module):
        write_functional(exported.graph)
    program = from_exported(exported, [])
    program.reads_layout = notes.layout_read
    program.example = flat_inputs(program.in_spec, args, kwargs)
    settle_equal_sizes(program)
    check_symbols(program.graph, program.user_inputs(), dynamic)
    return program


def from_exported(exported: ExportedProgram, example: list[Any]) -> Program:
    """Take over an exported program, in place where that is possible; ``example`` are its flat user inputs."""
    _refuse_training(exported.graph)  # decomposing splits these operators
    if must_decompose(exported.graph_module):
        exported = _decompose(exported)
        drop_cycles()
    _refuse_unsupported(exported)
    program = Program.from_exported(exported, example)
    inline_regions(program.module)
    refuse_left_over(program.module)
    complete_values(program.graph, program.fake_mode)
    write_out_negated(program)
    return program


def flat_inputs(in_spec: TreeSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of a call in the order of ``in_spec``, whose keyword arguments may stand in another order."""
    order = in_spec.child(1).context
    if set(order) != set(kwargs):
        raise CaptureError(
            f"the keyword inputs {sorted(kwargs)} were given, and the program was captured with {sorted(order)}"
        )
    return tree_leaves((args, {name: kwargs[name] for name in order}))


def _of_exported(exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Program:
    if dynamic is not None:
        raise CaptureError(
            "dynamic was given with an ExportedProgram, whose sizes are settled; give dynamic_shapes to torch.export"
        )
    if not args and not kwargs:
        if exported.example_inputs is None:
            raise CaptureError(
                "the ExportedProgram carries no example inputs; give some, they are what rewrites are checked on"
            )
        args, kwargs = exported.example_inputs
    example = flat_inputs(exported.call_spec.in_spec, args, kwargs)
    expected = sum(spec.kind == InputKind.USER_INPUT for spec in exported.graph_signature.input_specs)
    if len(example) != expected:
        raise CaptureError(
            f"{len(example)} example inputs were given, and the ExportedProgram takes {expected}; give one for each"
        )
    if must_decompose(exported.graph_module):
        return from_exported(exported, example)  # decomposing makes a new program
    _refuse_unsupported(exported)
    copy = Program.from_exported(exported, example).copy()
    inline_regions(copy.module)
    refuse_left_over(copy.module)
    complete_values(copy.graph, copy.fake_mode)
    write_out_negated(copy)
    _refuse_training(copy.graph)
    return copy


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by the parameter of ``forward`` that takes them; raises ``CaptureError`` when they do not fit."""
    try:
        return call_signature(model.forward, kwargs).bind(*args, **kwargs).arguments
    except TypeError as error:
        given = [*(f"input {place}" for place in range(len(args))), *kwargs]
        raise CaptureError(
            f"the example inputs ({', '.join(given) or 'none'}) do not fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {error}; give the tensors that you would call the model with"
        ) from error


def _refuse_layouts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise CaptureError(
                f"an input has the layout {value.layout}, and dense tensors are compiled; give value.to_dense()"
            )


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> tuple[ExportedProgram, Notes]:
    """Export, and leave the model's attributes as they were; one that sets some is first brought to rest."""
    state = ModelState(model)
    try:
        exported, notes = _export_once(model, args, kwargs, shapes)
    finally:
        state.restore()
    if notes.inputs_changed:
        raise CaptureError(
            f"{type(model).__name__}.forward changes a list, a dict or another container that it is given, which "
            "compiled code does not; let it change a copy, and return what the caller is to have"
        )
    if not notes.changed:
        return exported, notes
    _LOG.debug("forward sets %s", ", ".join(notes.changed))
    settle(model, lambda: _own_failure(model, args, kwargs))
    state = ModelState(model)
    try:
        return _export_once(model, args, kwargs, shapes)
    finally:
        state.restore()


def _export_once(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> tuple[ExportedProgram, Notes]:
    def export() -> ExportedProgram:
        with torch.no_grad(), _mode_of(model), masks_as_given():
            return torch.export.export(model, *_apart(args, kwargs), dynamic_shapes=shapes, strict=False)

    for hint in (contextlib.nullcontext, as_if_not_compiled):
        notes = Notes(layout_read=isinstance(model, fx.GraphModule) and reads_layout(model))
        try:
            with _quiet(), faster_export(model, notes, hint):
                return export(), notes
        except Exception as error:  # torch.export raises classes of many modules; its own way decides
            _LOG.debug("the fast export failed: %s", error)
    try:
        with _quiet():
            exported = export()
    except Exception as error:
        raise CaptureError(_why_refused(model, args, kwargs, shapes, error)) from error
    state = ModelState(model)
    _own_failure(model, args, kwargs)
    return exported, Notes(layout_read=True, changed=state.changes())  # nobody looked: take it to


def _mode_of(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Inference mode for a model that was made in it: torch.export sets flags of weights that are refused outside."""
    held = (*model.parameters(), *model.buffers())
    return torch.inference_mode() if any(map(torch.is_inference, held)) else contextlib.nullcontext()


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, each a tensor object of its own: torch.export takes one that is given twice, or is a weight of the
    model too, for one input, and the program would read it for both in every call."""
    apart: tuple[tuple[Any, ...], dict[str, Any]]
    apart = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs))
    return apart


#: What torch prints about an export that fails, before it raises: pages that our one sentence stands for.
_TALKATIVE = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loggers of torch rest, and so does the ``print`` by which torch.export shows how far it came."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    names = vars(export_trace())
    names["print"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        names.pop("print", None)
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _why_refused(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any, error: Exception) -> str:
    name = type(model).__name__
    own = _own_failure(model, args, kwargs)
    if own is not None:
        return f"{name} itself fails on the example inputs ({first_line(own)}); give inputs that it accepts"
    if shapes is not None and _exports_statically(model, args, kwargs):
        return (
            f"torch.export refuses {name} with the symbolic sizes that dynamic asks for ({why_not_traced(error)}); "
            "give a dynamic_shapes specification that fits the inputs and the model, or leave dynamic out: a new shape "
            "is then captured when it comes"
        )
    advice = "make its forward traceable, or use torch.compile(model, backend='regraft'), which allows graph breaks"
    if getattr(getattr(model, "config", None), "use_cache", False) and kwargs.get("use_cache") is not False:
        advice = "pass use_cache=False, so that it returns no cache object"
    elif (unknown := unknown_output(error)) is not None:
        advice = (
            f"return a tuple or a dict, or register the class once: torch.export.register_dataclass({unknown}) for a "
            "dataclass, torch.utils._pytree.register_pytree_node for any other"
        )
    return f"torch.export refuses {name} ({why_not_traced(error)}); {advice}"


def _exports_statically(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        with _quiet(), torch.no_grad(), masks_as_given():
            torch.export.export(model, args, kwargs, strict=False)
    except Exception:  # as for export
        return False
    return True


def _own_failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            inputs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
            torch.func.functional_call(model, buffers, *inputs)
    except Exception as error:  # a model may raise anything
        return error
    return None


def _decompose(exported: ExportedProgram) -> ExportedProgram:
    try:
        with torch.no_grad(), resting_collector():
            functional: ExportedProgram = exported.run_decompositions({})
            return functional
    except Exception as error:  # as for export
        raise CaptureError(
            f"the model changes tensors in place in a way that cannot be made functional ({first_line(error)}); write "
            "that part without in-place operations"
        ) from error


def _refuse_unsupported(exported: ExportedProgram) -> None:
    for inward in exported.graph_signature.input_specs:
        if inward.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise CaptureError(f"the model holds a script object ({inward.target}), which regraft cannot compile")
    for outward in exported.graph_signature.output_specs:
        if outward.kind in (OutputKind.PARAMETER_MUTATION, OutputKind.TOKEN):
            raise CaptureError(
                f"the model's forward changes its parameter {outward.target}; make it a buffer, or do not change it"
            )


def _refuse_training(graph: fx.Graph) -> None:
    for node in graph.nodes:
        argument = _TRAINING_ARGUMENTS.get(node.target)
        if argument is None:
            continue
        where = user_line(node)
        given = arguments(node)
        without_statistics = node.target is _ATEN.batch_norm.default and given.get("running_mean") is None
        if given.get(argument) and not without_statistics and given.get("p") != 0:
            raise CaptureError(
                f"{node.target} works in training mode{' at ' + where if where else ''}, and regraft compiles for "
                "inference; call model.eval() first"
            )
