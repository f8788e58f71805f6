"""Every engine's format by name: writing a plan, and reading a file back against a model."""

from __future__ import annotations

from pathlib import Path

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.easyinfra import read_easyinfra, write_easyinfra
from regraft.solvers.placement.exports.omni_infer import read_omni_infer, write_omni_infer
from regraft.solvers.placement.exports.sglang import read_sglang, write_sglang
from regraft.solvers.placement.exports.tensorrt_llm import read_tensorrt_llm_plan, write_tensorrt_llm
from regraft.solvers.placement.exports.vllm import FORMS, read_vllm_plan, write_vllm
from regraft.solvers.placement.exports.vllm_ascend import read_vllm_ascend, write_vllm_ascend
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan

#: ``vllm`` is the form of pull request 41141; the others are ``vllm-<number>``.
FORMATS = ("sglang", "trtllm", "vllm", *(f"vllm-{form}" for form in FORMS), "vllm-ascend", "omni", "easyinfra")

#: Forms in which layers may differ in slots; the others want the same number in every layer.
UNEQUAL_LAYERS = ("vllm-ascend", "omni")


def export(plan: Plan, engine: str, path: Path | str) -> None:
    """Write ``plan`` in an engine's form. Raises ``PlacementError`` for an unknown name or a plan that does not fit."""
    if engine == "vllm" or engine.removeprefix("vllm-") in FORMS:
        write_vllm(plan, path, "41141" if engine == "vllm" else engine.removeprefix("vllm-"))
        return
    writers = {
        "sglang": write_sglang,
        "trtllm": write_tensorrt_llm,
        "vllm-ascend": write_vllm_ascend,
        "omni": write_omni_infer,
        "easyinfra": write_easyinfra,
    }
    if engine not in writers:
        raise PlacementError(f"format {engine!r} was named; expected one of {', '.join(FORMATS)}")
    writers[engine](plan, path)


def read_export(engine: str, path: Path | str, model: MoeModel, num_ranks: int) -> Plan:
    """Read an engine's file back as a plan of ``model``. Raises ``PlacementError`` for what does not fit the model."""
    layers, hidden = model.layer_ids, model.num_hidden_layers
    if engine == "sglang":
        plan = read_sglang(path, num_ranks, layers)
        if plan.num_hidden_layers != hidden:
            raise PlacementError(
                f"{Path(path).name!r} has {plan.num_hidden_layers} rows; the model has {hidden} layers, "
                "and SGLang counts dense ones too"
            )
    elif engine == "trtllm":
        plan = read_tensorrt_llm_plan(path, num_ranks, layers, hidden)
    elif engine == "vllm" or engine.removeprefix("vllm-") in FORMS:
        plan = read_vllm_plan(path, num_ranks, layers, hidden)
    elif engine == "vllm-ascend":
        plan = read_vllm_ascend(path, layers, hidden)
    elif engine == "omni":
        plan = read_omni_infer(path, layers, hidden)
    elif engine == "easyinfra":
        plan = read_easyinfra(path, num_ranks, layers, hidden)
    else:
        raise PlacementError(f"format {engine!r} was named; expected one of {', '.join(FORMATS)}")
    if plan.num_experts != model.num_experts or plan.num_ranks != num_ranks:
        raise PlacementError(
            f"{Path(path).name!r} places {plan.num_experts} experts on {plan.num_ranks} ranks; "
            f"expected {model.num_experts} on {num_ranks}"
        )
    return plan
