"""Capture: what goes in, what the program promises, and the sentence for what is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from regraft.ir.capture import CaptureError, capture
from regraft.ir.nodes import user_line
from regraft.ir.program import Program


def outputs(program: Program) -> Any:
    return program.user_outputs(program.callable()(*program.example))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, extra: Any = None) -> dict[str, Any]:
        y = self.linear(x) * scale
        return {"y": y, "none": extra, "constant": 3, "pair": (y + 1, [y - 1])}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


def test_keyword_inputs_of_any_order_and_nested_outputs_come_back_as_they_were() -> None:
    model, x = Scaled().eval(), torch.randn(2, 4)
    program = capture(model, (), {"scale": 2.0, "x": x})
    got, expected = outputs(program), model(x, 2.0)
    assert got["none"] is None and got["constant"] == 3
    assert torch.equal(got["y"], expected["y"]) and torch.equal(got["pair"][1][0], expected["pair"][1][0])
    assert program.example[0] == 2.0 and program.example[1] is x


def test_nested_inputs_are_flattened_in_order() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], named: dict[str, Tensor]) -> Tensor:
            return pair[0] - pair[1] * named["z"]

    a, b, z = torch.randn(3, 2, 2).unbind()
    program = capture(Nested().eval(), ((a, b),), {"named": {"z": z}})
    assert torch.equal(outputs(program), a - b * z)


def test_a_named_tuple_and_a_dataclass_like_output_keep_their_class() -> None:
    class Pair(NamedTuple):
        left: Tensor
        right: Tensor

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Pair:
            return Pair(x + 1, x - 1)

    assert type(outputs(capture(Model().eval(), (torch.ones(2),)))) is Pair


def test_weights_are_the_models_own_tensors_and_tied_ones_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model = Tied().eval()
    held = capture(model, (torch.tensor([1, 2]),)).weights.originals
    assert held and all(tensor is model.embed.weight for tensor in held.values())


def test_buffer_mutation_becomes_an_output_and_the_module_is_left_alone() -> None:
    model = Counter().eval()
    program = capture(model, (torch.zeros(2),))
    assert list(program.mutated().values()) == ["count"]
    assert torch.equal(outputs(program), torch.ones(2)) and torch.equal(model.count, torch.zeros(2))
    assert program.weights.originals["count"] is model.count


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return 100 * x + 10 * parts["one"] + parts["other"] + self.weight


def test_a_tensor_that_is_given_twice_or_is_a_weight_is_another_input_each_time() -> None:
    model, x = Summed(), torch.ones(3)
    for given in ((x, {"one": x, "other": x}), (model.weight, {"one": x, "other": x.view(3)})):
        program = capture(model.eval(), given)
        (result,) = program.callable()(torch.full((3,), 4.0), torch.full((3,), 3.0), torch.full((3,), 2.0))
        assert torch.equal(result, torch.full((3,), 433.0))


def test_in_place_operators_on_intermediates_become_functional() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = 0
            return y.add_(1)

    program = capture(InPlace().eval(), (torch.ones(2, 3),))
    assert torch.equal(outputs(program), torch.tensor([[1.0, 3, 3], [1, 3, 3]]))
    assert not any(n.op == "call_function" and n.target._schema.is_mutable for n in program.graph.nodes)


class Regions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
            with torch.enable_grad():
                y = y + 1
        with torch.autocast("cpu", enabled=False):
            return y.sin()


def assert_flat(program: Program) -> None:
    assert all(node.op in ("placeholder", "call_function", "output") for node in program.graph.nodes)
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in program.graph.nodes)
    assert not list(program.module.named_children())
    assert all("val" in node.meta for node in program.graph.nodes if node.op != "output")


def test_gradient_and_disabled_autocast_regions_vanish() -> None:
    x = torch.randn(2, 3)
    program = capture(Regions().eval(), (x,))
    assert_flat(program)
    assert torch.equal(outputs(program), (x * 2 + 1).sin())


def test_regions_in_an_exported_program_are_inlined_and_the_program_is_not_changed() -> None:
    x = torch.randn(2, 3)
    exported = torch.export.export(Regions().eval(), (x,), strict=False)
    before = str(exported.graph)
    program = capture(exported)
    assert_flat(program)
    assert str(exported.graph) == before and torch.equal(outputs(program), (x * 2 + 1).sin())


def test_enabled_autocast_is_kept_as_casts() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.matmul(x, y)

    x, y = torch.randn(2, 4, 4).unbind()
    program = capture(Mixed().eval(), (x, y))
    assert_flat(program)
    assert torch.equal(outputs(program), x.bfloat16() @ y.bfloat16())


def test_a_saved_export_and_a_traced_graph_module_are_taken(tmp_path: Any) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.GELU()).eval(), torch.randn(2, 3)
    torch.export.save(torch.export.export(model, (x,), strict=False), tmp_path / "m.pt2")
    assert torch.equal(outputs(capture(torch.export.load(tmp_path / "m.pt2"))), model(x))
    assert torch.equal(outputs(capture(torch.fx.symbolic_trace(model), (x,))), model(x))


def test_nodes_know_the_users_line() -> None:
    program = capture(Scaled().eval(), (torch.randn(2, 4),))
    linear = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert "test_capture.py" in user_line(linear) and user_line(linear).endswith("in forward")


def test_the_models_forward_is_put_back() -> None:
    model = Scaled().eval()
    capture(model, (torch.randn(2, 4),))
    assert "forward" not in vars(model)


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_that_leaves_out_what_it_needs_when_it_is_compiled_is_captured_as_it_runs() -> None:
    class Guarded(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            if mask is None and not torch.compiler.is_compiling():
                mask = torch.ones(x.shape[0])
            return x * mask[:, None]  # type: ignore[index]

    x = torch.randn(2, 4)
    assert torch.equal(outputs(capture(Guarded().eval(), (x,))), x)
    assert not torch.compiler.is_compiling()


def test_inputs_that_do_not_fit_forward_are_named() -> None:
    message = refusal(Scaled().eval(), (), {"wrong": 1})
    assert "(wrong)" in message and "Scaled.forward(x" in message and "missing a required argument: 'x'" in message


def test_inputs_that_the_model_itself_refuses_are_told_apart_from_export() -> None:
    message = refusal(nn.Linear(4, 4).eval(), (torch.randn(2, 5),))
    assert "Linear itself fails on the example inputs" in message


def test_data_dependent_control_flow_is_refused_with_its_line_and_its_cause() -> None:
    class Branch(nn.Module):
        def decides(self, x: Tensor) -> bool:
            return bool(x.sum() > 0)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if self.decides(x) else x - 1

    where = r"depends on a tensor's values, at .*test_capture\.py:\d+ in decides\)"
    with pytest.raises(CaptureError, match=rf"torch\.export refuses Branch \(the next step {where}") as caught:
        capture(Branch().eval(), (torch.ones(2),))
    assert caught.value.__cause__ is not None


def test_a_dropout_that_drops_is_refused() -> None:
    message = refusal(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(), (torch.ones(1, 2),))
    assert "training mode" in message and "model.eval()" in message


def test_a_dropout_that_drops_nothing_is_none() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.0) + 1  # in training mode by default

    assert torch.equal(capture(Drops().eval(), (torch.ones(2),)).callable()(torch.ones(2))[0], torch.full((2,), 2.0))


def test_batch_statistics_in_training_mode_are_refused() -> None:
    assert "training mode" in refusal(nn.BatchNorm1d(2).train(), (torch.randn(3, 2),))


def test_a_model_that_changes_a_parameter_is_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.add_(1)
            return x * self.weight

    assert "parameter" in refusal(Writes().eval(), (torch.ones(2),))


def test_something_else_than_a_model_is_refused() -> None:
    assert "a str was given as the model" in refusal("model")


def test_a_cache_in_the_output_names_the_way_out() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.zeros(2, 4, dtype=torch.long)
    assert "use_cache=False" in refusal(model, (), {"input_ids": ids})
    program = capture(model, (), {"input_ids": ids, "use_cache": False})
    with torch.no_grad():
        assert torch.equal(outputs(program).logits, model(ids, use_cache=False).logits)


def test_transformer_modules_do_not_look_at_their_mask() -> None:
    """PyTorch compares it with a causal one for a mere hint, which export cannot do."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)
            self.decoder = nn.TransformerDecoder(decoder, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = self.decoder(x, self.encoder(x, mask=mask), tgt_mask=mask)
            return result

    model, x = Model().eval(), torch.randn(2, 5, 8)
    for mask in (nn.Transformer.generate_square_subsequent_mask(5), torch.zeros(5, 5)):
        program = capture(model, (x, mask))
        torch.testing.assert_close(outputs(program), model(x, mask), rtol=1e-5, atol=1e-5)
    assert nn.modules.transformer._detect_is_causal_mask(torch.zeros(2, 2), None, 2) is False


def test_a_negated_view_is_written_out_for_those_who_read_its_memory() -> None:
    class Imaginary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.randn(4, dtype=torch.complex64).conj().imag)

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_complex(x).conj().imag.T @ self.scale

    model, x = Imaginary(), torch.randn(4, 3, 2)
    program = capture(model, (x,))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.aten.resolve_neg.default) == 2
    (product,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.matmul.default)
    assert not any(operand.meta["val"].is_neg() for operand in product.all_input_nodes)
    torch.testing.assert_close(outputs(program), model(x))


def test_a_script_module_is_refused_with_what_to_give_instead() -> None:
    script = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(CaptureError, match=r"a ScriptModule was given.*give the nn\.Module"):
        capture(script, (torch.ones(1, 2),))
