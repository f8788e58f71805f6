"""Emitted files: their text, which is the same every time, and the operator that each registers.

After a deliberate change of the text: ``REGRAFT_GOLDEN=1 pytest tests/codegen/triton/test_emit.py`` writes it anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regraft.codegen.triton.attention_decode import emit_decode
from regraft.codegen.triton.attention_layout import KeyLayout
from regraft.codegen.triton.attention_prefill import emit_prefill
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.load import load_kernel
from regraft.ir.ops.attention import reference
from tests.codegen.triton.formula import operands

GOLDEN = Path(__file__).parent / "golden"
FP16, FP32 = torch.float16, torch.float32
ORIGIN = Origin(("attention(softmax, matmul)",), "attention_1", "model.py:12 in forward")
LAST = "band(None,key_len - query_len)"

KERNELS: dict[str, Kernel] = {
    "causal": emit_prefill(AttentionSpec(FP16, 128, 128, "band(None,0)", empty_rows="zero"), (ORIGIN,)),
    "sink_window_padding": emit_prefill(
        AttentionSpec(
            FP32, 96, 64, "(prefix(4) & band(None,0) | band(-511,0)) & keys(0)", empty_rows="mean", softcap=True
        )
    ),
    "sigmoid_bias": emit_prefill(
        AttentionSpec(FP16, 64, 64, bias="dense", weight="sigmoid", normaliser="sum_eps", constant=1e-8)
    ),
    "paged": emit_decode(AttentionSpec(FP16, 128, 128, LAST, sinks=True, lse=True), KeyLayout("paged", 16)),
    "tree": emit_decode(AttentionSpec(FP16, 80, 80, "prefix(key_len - query_len) | bits(0) & rows(1)")),
}


@pytest.mark.parametrize("name", KERNELS)
def test_the_text(name: str) -> None:
    path = GOLDEN / f"{name}.py"
    if os.environ.get("REGRAFT_GOLDEN"):
        path.write_text(KERNELS[name].source, encoding="utf-8")
    assert KERNELS[name].source == path.read_text(encoding="utf-8")


def test_the_head_says_where_a_kernel_comes_from() -> None:
    head = KERNELS["causal"].source.split('"""')[1]
    for fact in ("band(None,0)", "float16, head_dim 128", "attention_1", "model.py:12 in forward", ORIGIN.rules[0]):
        assert fact in head


def test_a_kernel_is_named_by_what_it_computes_not_by_who_asks() -> None:
    spec = AttentionSpec(FP16, 128, 128, "band(None,0)", empty_rows="zero")
    assert emit_prefill(spec).name == KERNELS["causal"].name
    assert emit_prefill(AttentionSpec(FP16, 128, 128, "band(None,1)", empty_rows="zero")).name != KERNELS["causal"].name


def test_a_text_of_the_user_stays_inside_the_head() -> None:
    kernel = emit_prefill(AttentionSpec(FP16, 16, 16), (Origin(node='"""', line="C:\\temp\n1/0"),))
    compile(kernel.source, "kernel", "exec")
    assert "import os" not in kernel.source and kernel.source.count('"""') % 2 == 0


def test_bf16_is_the_same_text_but_for_the_element_type() -> None:
    """What the interpreter cannot compute, its twins in fp16 answer for."""

    def text(dtype: torch.dtype) -> str:
        kernel = emit_prefill(AttentionSpec(dtype, 64, 64, "band(None,0)"))
        body = kernel.source.split('"""', 2)[2].replace(kernel.name, "kernel")
        return re.sub(r"torch\.b?float16", "half", body)

    assert text(torch.bfloat16) == text(torch.float16)


@pytest.mark.parametrize("name", ["causal", "sink_window_padding", "tree"])
def test_the_operator(name: str) -> None:
    """Fake, schema and CPU kernel agree with each other, and the CPU kernel with the definition of attention."""
    kernel = KERNELS[name]
    operator = getattr(torch.ops.regraft_kernels, load_kernel(kernel).__name__.rpartition(".")[2])
    width = {"causal": 128, "sink_window_padding": 96, "tree": 80}[name]
    value_dim = 64 if name == "sink_window_padding" else width
    dtype = FP32 if name == "sink_window_padding" else FP16
    spec = AttentionSpec(dtype, width, value_dim, softcap=name == "sink_window_padding")
    given = operands(spec, 2, 1, 2, 5, 5)
    masks = {"sink_window_padding": [torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 1]])]}.get(name, [])
    if name == "tree":
        masks = [torch.randint(1, 32, (1, 5, 1)), torch.ones(1, 5)]
    given |= {f"mask_{number}": mask for number, mask in enumerate(masks)}
    arguments = [given[operand] for operand in kernel.operands]
    torch.library.opcheck(operator.default, tuple(arguments))
    text = {"causal": "band(None,0)", "tree": "prefix(key_len - query_len) | bits(0) & rows(1)"}.get(
        name, "(prefix(4) & band(None,0) | band(-511,0)) & keys(0)"
    )
    fill = torch.finfo(FP32).min if name == "sink_window_padding" else None
    wanted = reference(
        given["query"], given["key"], given["value"], masks, None, None, None,
        given["scale"], text, fill, "nan", given.get("softcap", 0.0),
    )  # fmt: skip
    torch.testing.assert_close(operator(*arguments), wanted, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_the_operator_is_exported_and_compiled() -> None:
    spec = AttentionSpec(FP32, 16, 16, "band(None,0)", empty_rows="zero")
    operator = load_kernel(emit_prefill(spec)).operator
    given = operands(spec, 1, 1, 2, 8, 8)

    class Model(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return operator(query, key, value, 0.3) + 1

    arguments = (given["query"], given["key"], given["value"])
    wanted = Model()(*arguments)
    exported = torch.export.export(Model(), arguments).module()
    torch.testing.assert_close(exported(*arguments), wanted)
    torch.testing.assert_close(torch.compile(Model(), backend="aot_eager", fullgraph=True)(*arguments), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 8)}, r"expected \[batch, heads, length, dim\]"),
        ({"query": torch.zeros(1, 2, 8, 24)}, "expected head_dim 16"),
        ({"key": torch.zeros(1, 3, 8, 16)}, "expected keys as values"),
        ({"query": torch.zeros(3, 2, 8, 16)}, "expected one batch"),
        ({"query": torch.zeros(1, 2, 8, 16, dtype=torch.float64)}, "expected torch.float32"),
    ],
)
def test_a_wrong_operand_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    spec = AttentionSpec(FP32, 16, 16, "band(None,0)")
    given = operands(spec, 1, 1, 2, 8, 8) | change
    with pytest.raises(ValueError, match=message):
        load_kernel(emit_prefill(spec)).launch(given["query"], given["key"], given["value"], 0.3)


def test_a_file_stands_alone(tmp_path: Path) -> None:
    """Torch and triton are all that it needs."""
    path = tmp_path / "kernel.py"
    path.write_text(KERNELS["paged"].source, encoding="utf-8")
    code = "import sys, kernel; assert not [name for name in sys.modules if name.startswith('regraft')]"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True)
