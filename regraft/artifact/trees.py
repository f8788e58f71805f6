"""Structures of inputs and outputs (``TreeSpec``) as JSON.

``torch.utils._pytree.treespec_loads`` imports modules that its text names (for enums and default factories),
so it cannot read a file that is not trusted. Here a class is only looked up among those registered as pytree nodes;
for the outputs of an installed transformers, its own module registers them. A named tuple without a registered name is
the class of that name in a module that is loaded, or else one made of the same fields.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from regraft.artifact.errors import ArtifactError
from regraft.artifact.values import decode_value, encode_value

_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str, bool)}
#: Modules of transformers that define what its models return: the only ones that an artifact makes the loader import.
_MODEL_OUTPUTS = re.compile(r"transformers\.(modeling_outputs|cache_utils|models\.\w+\.modeling_\w+)", re.ASCII)
_BUILTIN: dict[str, Any] = {
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "deque": deque,
    "defaultdict": defaultdict,
    "namedtuple": namedtuple,
}
_BUILTIN_NAMES = {kind: name for name, kind in _BUILTIN.items()}


def encode_tree(spec: TreeSpec) -> Any:
    """A tree as JSON; raises ``ArtifactError`` for a class that is not registered under a name."""
    if spec.is_leaf():
        return None
    children = [encode_tree(child) for child in spec.children()]
    kind, context = spec.type, spec.context
    if kind in _BUILTIN_NAMES:
        return {"type": _BUILTIN_NAMES[kind], "context": _encode_context(kind, context), "children": children}
    name = _registered_name(kind)
    node = pytree.SUPPORTED_SERIALIZED_TYPES[kind]
    data = context if node.to_dumpable_context is None else node.to_dumpable_context(context)
    return {"class": name, "context": encode_value(data), "children": children}


def decode_tree(data: Any) -> TreeSpec:
    """Inverse of :func:`encode_tree`; ``ArtifactError`` when a class is not registered here."""
    if data is None:
        return pytree.tree_structure(0)
    if not isinstance(data, dict) or not isinstance(data.get("children"), list):
        raise _malformed(data)
    children = [decode_tree(child) for child in data["children"]]
    if "class" in data:
        kind = _registered_class(data["class"])
        node = pytree.SUPPORTED_SERIALIZED_TYPES[kind]
        context = decode_value(data["context"])
        if node.from_dumpable_context is not None:
            context = node.from_dumpable_context(context)
        return TreeSpec(kind, context, children)
    kind = _BUILTIN.get(data.get("type", ""))
    if kind is None:
        raise _malformed(data)
    context = _decode_context(kind, data["context"])
    keys = context[1] if kind is defaultdict else context
    if isinstance(keys, list) and len(keys) != len(children):
        raise _malformed(data)
    if kind is namedtuple and len(getattr(context, "_fields", ())) != len(children):
        raise _malformed(data)
    return TreeSpec(kind, context, children)


def _encode_context(kind: Any, context: Any) -> Any:
    if kind is namedtuple:
        return _registered_name(context) if _is_registered(context) else _named_tuple_as_data(context)
    if kind is defaultdict:
        factory, keys = context
        if factory is not None and _FACTORIES.get(factory.__name__) is not factory:
            raise ArtifactError(
                f"a defaultdict with the factory {factory!r} cannot be saved; use a dict, or one of "
                f"{', '.join(_FACTORIES)}"
            )
        return [None if factory is None else factory.__name__, encode_value(keys)]
    return encode_value(context)


def _decode_context(kind: Any, data: Any) -> Any:
    if kind is namedtuple:
        return _named_tuple(data) if isinstance(data, dict) else _registered_class(data)
    if kind is defaultdict:
        name, keys = data
        if name is not None and name not in _FACTORIES:
            raise _malformed(data)
        return [None if name is None else _FACTORIES[name], _keys(keys)]
    return _keys(data) if kind in (dict, OrderedDict) else decode_value(data)


def _keys(data: Any) -> list[Any]:
    keys = decode_value(data)
    if not isinstance(keys, list):
        raise _malformed(data)
    return keys


def _named_tuple_as_data(kind: Any) -> dict[str, Any]:
    return {"module": kind.__module__, "name": kind.__qualname__, "fields": list(kind._fields)}


def _named_tuple(data: dict[str, Any]) -> Any:
    """The class that the data describe. No module is imported for it: where none that is loaded defines it, a class of
    the same name and fields takes its place."""
    found: Any = sys.modules.get(str(data.get("module")))
    for part in str(data.get("name")).split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and pytree.is_namedtuple_class(found) and _named_tuple_as_data(found) == data:
        return found
    try:
        return namedtuple(data["name"].rpartition(".")[2], data["fields"], module=data["module"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _malformed(data) from None


def _is_registered(kind: Any) -> bool:
    node = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    return node is not None and node.serialized_type_name not in (None, pytree.NO_SERIALIZED_TYPE_NAME_FOUND)


def _registered_name(kind: Any) -> str:
    if not _is_registered(kind):
        raise ArtifactError(
            f"the class {getattr(kind, '__qualname__', kind)} in the inputs or outputs cannot be saved: it is "
            "registered as a pytree node without a name; pass serialized_type_name=… to "
            "torch.utils._pytree.register_pytree_node"
        )
    return str(pytree.SUPPORTED_SERIALIZED_TYPES[kind].serialized_type_name)


def _registered_class(name: Any) -> Any:
    if isinstance(name, str) and name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        _import_model_output(name)
    kind = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ArtifactError(
            f"its inputs or outputs use the class {str(name)[:200]}, which is not registered as a pytree node in this "
            "process; import the module that defines it before loading"
        )
    return kind


def _import_model_output(name: str) -> None:
    """Let transformers register its class ``name``, if it is installed and that is one of its outputs or caches."""
    module = name.rpartition(".")[0]
    if _MODEL_OUTPUTS.fullmatch(module):
        with contextlib.suppress(Exception):  # another version without it: the caller says what is missing
            importlib.import_module(module)


def _malformed(data: Any) -> ArtifactError:
    return ArtifactError(f"the structure of inputs or outputs is malformed ({str(data)[:80]}); save the model again")
