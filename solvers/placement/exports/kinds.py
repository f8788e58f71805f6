"""Which engine's form a placement file is of, told by its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.easyinfra import KEY as EASYINFRA_KEY
from regraft.solvers.placement.exports.sglang import KEY as SGLANG_KEY
from regraft.solvers.placement.exports.tensorrt_llm import KEYS as TENSORRT_KEYS
from regraft.solvers.placement.plan import FORMAT

#: Our own form beside those of ``exports.all``.
OWN_FORM = "regraft"
_ARRAY = b"\x93NUMPY"
#: A key that only one form has at its top.
_FORM_OF_KEY = {SGLANG_KEY: "sglang", EASYINFRA_KEY: "easyinfra", "layer_list": "vllm-ascend"}


def plan_form(path: Path | str) -> str:
    """The name of the form. Raises ``PlacementError`` for a file that cannot be read, or is of none."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlacementError(f"plan file {path.name!r} cannot be read: {error.strerror or error}") from error
    if content.startswith(_ARRAY):
        return "omni"
    text = content.decode("utf-8", "replace")
    try:
        form = _form_of_json(json.loads(text))
    except json.JSONDecodeError:
        form = "trtllm" if all(f"{key}:" in text for key in TENSORRT_KEYS) else None
    if form is None:
        raise PlacementError(
            f"plan file {path.name!r} is {'empty' if not content else 'of no known form'}; expected a plan of this "
            "project, or a placement file of an engine: name its form if it is one"
        )
    return form


def _form_of_json(found: Any) -> str | None:
    if isinstance(found, list):
        return "vllm-49572"
    if not isinstance(found, dict):
        return None
    if found.get("format") == FORMAT:
        return OWN_FORM
    if found.get("record_type") == "eplb_initial_mapping":
        return "vllm"
    if "expert_to_ep_rank" in found:
        return "vllm-34811"
    return next((form for key, form in _FORM_OF_KEY.items() if key in found), None)
