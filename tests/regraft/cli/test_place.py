"""``regraft place``: every form of trace, the table and its data, and one sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from regraft.cli.main import app
from regraft.solvers.placement.baselines.simple import contiguous
from regraft.solvers.placement.cluster import Cluster
from regraft.solvers.placement.exports.all import FORMATS
from regraft.solvers.placement.model import MoeModel
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.readers.kinds import kind_of
from regraft.solvers.placement.readers.native import write_trace
from regraft.solvers.placement.slots import uniform_slots
from regraft.solvers.placement.trace import Batch, Trace
from tests.regraft.placement.recordings import CONFIG, EXPERTS, FORMS, LAYERS, TOP_K, counts_json, trace, vllm_lines

RANKS = 4
TOPOLOGY = "nodes = 2\ngpus_per_node = 2\n[gpu]\nmemory = 1.0\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, entered, with a topology, a config and a trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.toml").write_text(TOPOLOGY)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_trace(trace(), tmp_path / "t.npz")
    return tmp_path


def place(*arguments: object, quick: bool = True, seconds: int = 1) -> Result:
    """The command on the folder's cluster."""
    limit = ("--time-limit", seconds) if quick else ()
    given = ("place", *arguments, "--topology", "cluster.toml", *limit)
    return CliRunner().invoke(app, [str(argument) for argument in given])


def planned(*arguments: object, seconds: int = 1) -> dict[str, Any]:
    """Its data, after it went well; the plan is valid."""
    result = place(*arguments, "-o", "plan.json", "--json", seconds=seconds)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def fault(result: Result, code: int, *parts: str) -> None:
    """One sentence on stderr, no file written, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("regraft: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr
    assert not Path("plan.json").exists()
    assert not [path.name for path in Path().iterdir() if path.name.startswith(".")]


def test_auto_stands_beside_every_baseline(folder: Path) -> None:
    result = place("t.npz", "-o", "plan.json", "--config", "config.json", "--holdout", 0.5)
    assert result.exit_code == 0, result.output
    for name in ("auto", "contiguous", "round-robin", "eplb", "random", "moetuner", "held out", "wrote plan.json"):
        assert name in result.stdout
    plan = Plan.load("plan.json")
    assert (plan.num_ranks, plan.num_experts, plan.method) == (RANKS, EXPERTS, "auto")


def test_data_hold_every_figure_and_auto_is_best(folder: Path) -> None:
    data = planned("t.npz", "--config", "config.json", "--holdout", 0.5)
    methods = {row["method"]: row for row in data["methods"]}
    assert next(iter(methods)) == "auto" and {"eplb", "moetuner", "contiguous"} <= set(methods)
    least = min(row["planned"]["objective"] for row in methods.values())
    assert methods["auto"]["planned"]["objective"] <= least * (1 + 1e-9)
    assert 0 < methods["auto"]["held_out"]["balancedness"] <= 1 and methods["auto"]["broken"] == []
    assert data["solution"]["bound"] <= data["solution"]["objective"] * (1 + 1e-9)
    assert data["migration"] is None


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_is_known_by_its_content(form: str, folder: Path) -> None:
    FORMS[form](folder / "recording")
    assert kind_of(folder / "recording") == form
    assert planned("recording", "--config", "config.json")["methods"][0]["method"] == "auto"


def test_what_a_trace_leaves_open_is_asked_for(folder: Path) -> None:
    vllm_lines(folder / "v.jsonl")
    fault(place("v.jsonl", "-o", "plan.json"), 2, "pass --config or --top-k")
    assert "assumed" in planned("v.jsonl", "--top-k", TOP_K)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "vllm-34811"])
def test_every_form_is_written_and_validated(form: str, folder: Path) -> None:
    written = planned("t.npz", "--config", "config.json", "--redundant", 4, "--format", form, seconds=0)
    assert written["format"] == form
    for named in (("--format", form), ()):  # without a name the form is told by the content
        result = place("--validate", "plan.json", *named, "--config", "config.json")
        assert result.exit_code == 0 and "is a valid plan" in result.stdout, result.output
    (folder / "other.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": LAYERS + 1}))
    wrong = place("--validate", "plan.json", "--format", form, "--config", "other.json")
    assert wrong.exit_code == 2 and "layer" in wrong.stderr


def test_a_plan_that_breaks_constraints_is_refused(folder: Path) -> None:
    model, cluster = MoeModel.simple(LAYERS, EXPERTS, TOP_K), Cluster.uniform(2, 2)
    plan = contiguous(model, cluster, uniform_slots(model, cluster))
    plan.slots[0][0, 0] = 1
    plan.save(folder / "bad.json")
    result = place("--validate", "bad.json", "--config", "config.json")
    assert result.exit_code == 1 and "layer 0 has no copy of expert 0" in result.stderr


def test_migration_from_the_plan_in_service_is_bounded(folder: Path) -> None:
    planned("t.npz", "--config", "config.json")
    Path("plan.json").rename("now.json")
    nothing = planned("t.npz", "--config", "config.json", "--current", "now.json")
    assert nothing["migration"]["experts"] == 0
    write_trace(trace(seed=5), folder / "later.npz")
    moved = planned("later.npz", "--config", "config.json", "--current", "now.json", "--max-moves", 2)
    assert moved["migration"]["experts"] <= 2
    assert "current" in [row["method"] for row in moved["methods"]]


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "vllm-34811"])
def test_the_plan_in_service_may_be_of_any_form(form: str, folder: Path) -> None:
    arguments = ("t.npz", "--config", "config.json", "--redundant", 4)
    planned(*arguments, "--format", form, seconds=0)
    Path("plan.json").rename("now")
    for named in (("--current-format", form), ()):
        data = planned(*arguments, "--current", "now", *named, seconds=0)
        assert data["migration"]["experts"] == 0 and data["migration"]["payback_batches"] == 0


def test_one_map_of_vllm_may_be_in_service(folder: Path) -> None:
    (folder / "now").write_text(json.dumps({"expert_to_ep_rank": [0, 1, 2, 3] * 2}))
    data = planned("t.npz", "--config", "config.json", "--current", "now", "--max-moves", 0)
    assert data["migration"]["experts"] == 0
    assert sorted(Plan.load("plan.json").slots[0][1].tolist()) == [1, 5]


def test_a_budget_of_copies_is_spent_by_layer(folder: Path) -> None:
    """One layer is even, the other has a hot expert: the budget of one slot per rank goes there."""
    recorded = Trace(EXPERTS, TOP_K, (0, 1), (Batch(np.array([[100] * 8, [10] * 7 + [500]])),))
    write_trace(recorded, folder / "hot.npz")
    gigabytes = 3 * 64 * 128 * 2 / 1e9
    data = planned("hot.npz", "--config", "config.json", "--replica-budget", 1.5 * gigabytes, "--format", "omni")
    assert np.load("plan.json").sum((0, 2)).tolist() == [8, 12]
    planned("hot.npz", "--config", "config.json", "--replica-budget", 0)
    assert Plan.load("plan.json").slots_per_rank == (2, 2)
    assert data["methods"][0]["planned"]["balancedness"] > 0.8


def test_scenarios_are_planned_for_the_worst(folder: Path) -> None:
    counts_json(folder / "c.json")
    data = planned("c.json", "--aggregate", "min-max", "--communication", "per-expert", "--split", "nearest")
    assert set(data["methods"][0]["planned"]["scenarios"]) == {"code", "law"}
    assert list(planned("c.json", "--scenarios", "all")["methods"][0]["planned"]["scenarios"]) == ["all"]


def test_no_time_gives_the_best_baseline(folder: Path) -> None:
    result = place("t.npz", "-o", "plan.json", "--time-limit", 0, "--json", quick=False)
    data = json.loads(result.stdout)
    assert data["solution"]["stop"] in ("time limit", "optimal") and "moetuner" in data["skipped"]
    assert Plan.load("plan.json").num_experts == EXPERTS


def nan_counts(path: Path) -> None:
    counts_json(path)
    path.write_text(path.read_text().replace("[[1,", "[[NaN,", 1))


def negative_counts(path: Path) -> None:
    counts_json(path)
    path.write_text(path.read_text().replace("[[1,", "[[-1,", 1))


def cut_off(path: Path) -> None:
    write_trace(trace(), path.with_suffix(".npz"))
    path.write_bytes(path.with_suffix(".npz").read_bytes()[:-200])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text("hello"), "of no known form"),
        (lambda path: path.mkdir(), "no meta_info.json"),
        (lambda path: path.write_text('{"expert_counts": 3}'), "holds no recorded counts"),
        (lambda path: path.write_text('{"record_type": "eplb_load_stats", "expert_'), "holds no recorded counts"),
        (lambda path: torch.save({"other": torch.zeros(1)}, path), "expected logical_count"),
        (lambda path: torch.save([Path("x")], path), "cannot be read as tensors alone"),
        (lambda path: write_trace(trace(experts=16), path.with_suffix(".npz")) or path.with_suffix(".npz").rename(path),
         "another model"),
        (lambda path: write_trace(trace(layers=1), path.with_suffix(".npz")) or path.with_suffix(".npz").rename(path),
         "misses 1 of the config's 2 expert layers"),
        (nan_counts, "not finite"),
        (negative_counts, "negative counts"),
        (cut_off, "cut off or damaged"),
    ],
)  # fmt: skip
def test_a_wrong_trace_gets_one_sentence(make: Any, said: str, folder: Path) -> None:
    make(folder / "wrong")
    fault(place("wrong", "-o", "plan.json", "--config", "config.json"), 2, said)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--redundant", 3), 1, "use 4 redundant slots"),
        (("--memory", 0.00001), 1, "GB too little"),
        (("--holdout", 1.5), 2, "--holdout is 1.5"),
        (("--time-limit", -1), 2, "--time-limit is -1"),
        (("--max-moves", 3), 2, "give that plan with --current"),
        (("--current", "none.json"), 2, "plan file 'none.json' cannot be read"),
        (("--config", "none.json"), 2, "config 'none.json' cannot be read"),
        (("--config", "cluster.toml"), 2, "is no JSON"),
        (("--format", "other"), 2, "format 'other' was named"),
        (("--executor", "many"), 2, "executor 'many' was given"),
        (("--weight-type", "int3", "--config", "config.json"), 2, "element type 'int3'"),
        (("--format", "vllm-34811", "--redundant", 4), 1, "no replicas"),
        (("--current", "cluster.toml"), 2, "plan file 'cluster.toml' is of no known form"),
        (("--current", "t.npz", "--current-format", "sglang"), 2, "'t.npz' cannot be read"),
        (("--current-format", "sglang"), 2, "give that plan with --current"),
        (("--current-format", "other"), 2, "format 'other' was named"),
        (("--replica-budget", 1, "--format", "sglang"), 2, "'sglang' wants the same in every layer"),
        (("--replica-budget", 1, "--redundant", 4), 2, "give one of them"),
        (("--replica-budget", 1, "--current", "c", "--max-moves", 1), 2, "leave --replica-budget out"),
        (("--replica-budget", -1), 2, "--replica-budget is -1"),
        (("--replica-budget", 1, "--memory", 0.00001), 1, "GB too little"),
    ],
)
def test_a_wrong_option_gets_one_sentence(arguments: tuple[object, ...], code: int, said: str, folder: Path) -> None:
    fault(place("t.npz", "-o", "plan.json", *arguments, quick="--time-limit" not in arguments), code, said)


def test_a_wrong_topology_gets_one_sentence(folder: Path) -> None:
    def with_topology(text: str) -> Result:
        return CliRunner().invoke(app, ["place", "t.npz", "-o", "plan.json", "--topology", text])

    fault(with_topology("h100x9"), 2, "neither a file nor a preset")
    (folder / "c.toml").write_text('gpus_per_node = "two"')
    fault(with_topology("c.toml"), 2, "value of the wrong kind")


def test_a_faulty_call_says_what_is_missing(folder: Path) -> None:
    fault(place("t.npz"), 2, "an output -o PLAN")
    fault(place("--validate", "t.npz"), 2, "--config")
    fault(place("t.npz", "-o", "t.npz"), 2, "is read by the same command")


def test_dask_is_asked_for_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)  # as if it were not installed
    fault(place("t.npz", "-o", "plan.json", "--executor", "tcp://127.0.0.1:1"), 2, "distributed is not installed")


@pytest.mark.slow
def test_processes_give_the_same_plan(folder: Path) -> None:
    alone = place("t.npz", "-o", "one.json", "--time-limit", 600, quick=False)
    many = place("t.npz", "-o", "two.json", "--time-limit", 600, "--executor", 2, quick=False)
    assert alone.exit_code == many.exit_code == 0, many.output
    assert Path("one.json").read_text() == Path("two.json").read_text()


def test_the_page_stands_alone_and_escapes_names(folder: Path) -> None:
    write_trace(trace(scenario="<b>&"), folder / "named.npz")
    result = place("named.npz", "-o", "plan.json", "--html", "page.html", "--holdout", 0.5, "--current", "none.json")
    fault(result, 2, "none.json")
    planned("named.npz", "--html", "page.html", "--holdout", 0.5)
    page = Path("page.html").read_text()
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page and "http" not in page.replace("http-equiv", "")
    words = ("methods", "load", "traffic", "tail", "cost")
    assert all(f'id="{word}"' in page for word in words) and "times the mean" in page
    assert page.count('class="heat"') == 4
