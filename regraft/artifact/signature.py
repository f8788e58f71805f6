"""What a graph's placeholders and outputs mean (``ExportGraphSignature``) as JSON."""

from __future__ import annotations

from typing import Any

from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)

from regraft.artifact.errors import ArtifactError
from regraft.artifact.values import decode_value, encode_value

_NAMED_ARGUMENTS: dict[str, Any] = {
    "tensor": TensorArgument,
    "symint": SymIntArgument,
    "symfloat": SymFloatArgument,
    "symbool": SymBoolArgument,
}
_INPUTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT)
_OUTPUTS = (OutputKind.USER_OUTPUT, OutputKind.BUFFER_MUTATION)


def encode_signature(signature: ExportGraphSignature) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs as JSON; raises ``ArtifactError`` for kinds that inference does not have."""
    inputs: list[Any] = []
    for spec in signature.input_specs:
        if spec.kind not in _INPUTS:
            raise ArtifactError(f"the input {spec.arg.name} is a {spec.kind.name}, which artifacts cannot store")
        inputs.append([spec.kind.name, _encode_argument(spec.arg), spec.target, spec.persistent])
    outputs: list[Any] = []
    for result in signature.output_specs:
        if result.kind not in _OUTPUTS:
            raise ArtifactError(
                f"the output {result.arg.name} is a {result.kind.name}, which artifacts cannot store; let the model "
                "return new values instead of writing to its inputs"
            )
        outputs.append([result.kind.name, _encode_argument(result.arg), result.target])
    return inputs, outputs


def decode_signature(inputs: list[Any], outputs: list[Any]) -> ExportGraphSignature:
    """Inverse of :func:`encode_signature`."""
    return ExportGraphSignature(
        [
            InputSpec(_kind(kind, _INPUTS), _decode_argument(argument), _text(target), persistent=_flag(persistent))
            for kind, argument, target, persistent in inputs
        ],
        [
            OutputSpec(_kind(kind, _OUTPUTS), _decode_argument(argument), _text(target))
            for kind, argument, target in outputs
        ],
    )


def _encode_argument(argument: Any) -> Any:
    if isinstance(argument, ConstantArgument):
        return ["constant", argument.name, encode_value(argument.value)]
    for tag, kind in _NAMED_ARGUMENTS.items():
        if isinstance(argument, kind):
            return [tag, argument.name]
    raise ArtifactError(f"the input or output {argument} is a {type(argument).__name__}, which artifacts cannot store")


def _decode_argument(data: list[Any]) -> Any:
    tag, name, *value = data
    if not isinstance(name, str):
        raise ArtifactError("graph.json has an input or output without a name; save the model again")
    if tag == "constant":
        return ConstantArgument(name=name, value=decode_value(value[0]))
    return _NAMED_ARGUMENTS[tag](name=name)


def _kind(name: str, known: tuple[Any, ...]) -> Any:
    return {kind.name: kind for kind in known}[name]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _flag(value: Any) -> bool | None:
    return None if value is None else bool(value)
