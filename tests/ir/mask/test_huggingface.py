"""The masks which Hugging Face models really build, eager and sdpa, static and symbolic length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

from regraft.ir.mask import Interpreter, MaskForm, Refusal, TensorBias, recognize_mask, to_dense
from tests.support import needs_symbols_that_merge

transformers = pytest.importorskip("transformers")

LENGTH = 12
COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 99}
GROUPED = {**COMMON, "num_key_value_heads": 2}
CAUSAL, LOCAL = "band(None,0)", "band(-4,0)"

MODELS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "llama": ("LlamaConfig", "LlamaModel", {**GROUPED, "num_hidden_layers": 1}, {CAUSAL}),
    "mistral": (
        "MistralConfig",
        "MistralModel",
        {**GROUPED, "num_hidden_layers": 1, "sliding_window": 5},
        {LOCAL},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2Model",
        {**GROUPED, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 5},
        {CAUSAL, LOCAL},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3TextModel",
        {**GROUPED, "num_hidden_layers": 6, "head_dim": 8, "sliding_window": 5},
        {CAUSAL, LOCAL},
    ),
    "bert": ("BertConfig", "BertModel", {**COMMON, "num_hidden_layers": 1}, {"all"}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {
            **COMMON,
            "num_hidden_layers": 2,
            "local_attention": 6,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        {"all", "band(-3,3)"},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssModel",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "sliding_window": 5,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        {CAUSAL, LOCAL},
    ),
}


def exported(config: Any, model_name: str, padding: bool, dynamic: bool) -> tuple[torch.export.ExportedProgram, Any]:
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    inputs = {"input_ids": torch.randint(3, 99, (2, LENGTH))}
    if padding:
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.int64)
        inputs["attention_mask"][1, -3:] = 0
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {1: length} for name in inputs} if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False), inputs


def mask_reads(graph: torch.fx.Graph) -> list[tuple[Node, Node, Any]]:
    """(mask, its reader, key length) for each attention: the SDPA operand, or the addend of the scores."""
    found = []
    for node in graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            if mask is not None:
                found.append((mask, node, node.args[1].meta["val"].shape[-2]))
        elif node.target is torch.ops.aten.add.Tensor and isinstance(node.args[1], Node):
            scores, mask = (item.meta["val"] for item in node.args)
            if scores.dim() == 4 and mask.dim() == 4 and scores.shape[-1] == scores.shape[-2] == mask.shape[-1]:
                found.append((node.args[1], node, mask.shape[-1]))
    return found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_masks_of_real_models(name: str, implementation: str, padding: bool, dynamic: bool) -> None:
    if name in ("gpt_oss", "gemma2") and implementation == "sdpa":
        pytest.skip("the model itself does not offer sdpa")
    config_name, model_name, options, wanted = MODELS[name]
    if dynamic and "num_key_value_heads" in options:
        needs_symbols_that_merge()
    config = getattr(transformers, config_name)(**options)
    config._attn_implementation = implementation
    config.use_cache = False
    program, inputs = exported(config, model_name, padding, dynamic)
    interpreter = Interpreter(program.graph)
    forms: set[str] = set()
    for mask, reader, keys in mask_reads(program.graph):
        form = recognize_mask(mask, keys, keys, interpreter, reader)
        assert isinstance(form, MaskForm), form
        if isinstance(form.bias, TensorBias) and form.fill is None:
            continue  # an addition which is no attention (rotary embedding has the same rank)
        forms.add(str(form.predicate))
        if implementation == "eager" and str(form.predicate) != "all":
            assert form.fill == torch.finfo(torch.float32).min
        if form.tensors:
            assert [node.name for node in form.tensors] == ["attention_mask"]
            dense = to_dense(form.predicate, [inputs["attention_mask"]], 2, 1, LENGTH, LENGTH)
            assert bool(dense[0].any()) and not bool(dense[1, ..., -3:].any())
    both = {f"{text} & keys(0)" if text != "all" else "keys(0)" for text in wanted} if padding else wanted
    assert forms == both or (not padding and not both - forms - {"all"})


def test_t5_position_bias_stays_a_bias() -> None:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=99)
    config._attn_implementation = "eager"
    program, _ = exported(config, "T5EncoderModel", True, True)
    forms = [recognize_mask(mask, keys, keys, reader=reader) for mask, reader, keys in mask_reads(program.graph)]
    assert not any(isinstance(form, Refusal) for form in forms)
    found = [(str(form.predicate), form.bias is not None) for form in forms if isinstance(form, MaskForm)]
    assert ("all", True) in found and ("keys(0)", False) in found
