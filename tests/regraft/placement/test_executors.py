"""Work in local processes and on a Dask cluster gives the plan that it gives here; what breaks is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regraft.errors import OptionError
from regraft.placement.executors import ExecutorError, executor_of
from regraft.placement.request import Request, problem_of
from regraft.solvers.placement.auto.layer import Effort
from regraft.solvers.placement.auto.options import Options
from regraft.solvers.placement.auto.solve import solve
from regraft.solvers.placement.readers.native import write_trace
from regraft.solvers.placement.slots import uniform_slots
from tests.regraft.placement.recordings import counts_json, trace

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes of one thread each."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "c.toml").write_text("nodes = 2\ngpus_per_node = 2\n")
    write_trace(trace(), tmp_path / "t.npz")
    counts_json(tmp_path / "c.json")
    return tmp_path


QUICK = Options(time_limit=None, seed=3, effort=Effort(steps=20, rounds=1, programs=1, swaps=50))


def planned(request: Request, executor: str | None) -> np.ndarray[Any, Any]:
    """The trace read and the plan made with the executor."""
    with executor_of(executor) as workers:
        objective = problem_of(request, workers).objective
        slots = uniform_slots(objective.model, objective.cluster)
        return solve(objective, slots, options=QUICK, executor=workers).plan.array


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("t.npz", {}),
        ("t.npz", {"communication": "resident"}),
        ("c.json", {"aggregate": "min-max", "communication": "per-expert"}),
    ],
)
def test_two_processes_of_a_dask_cluster_give_the_same_plan(
    name: str, facts: dict[str, Any], cluster: Any, folder: Path
) -> None:
    request = Request(folder / name, str(folder / "c.toml"), **facts)
    there = planned(replace(request, piece_bytes=1), cluster.scheduler_address)
    assert (there == planned(request, None)).all()


@pytest.mark.slow
def test_tasks_run_in_the_cluster_s_processes(cluster: Any) -> None:
    with executor_of(cluster.scheduler_address) as executor:
        assert executor is not None
        assert executor._max_workers == 2  # type: ignore[attr-defined]  # what shares of time go by
        ids = set(executor.map(_process, range(20)))
    assert os.getpid() not in ids and len(ids) == 2


def _process(number: int) -> int:
    return os.getpid()


@pytest.mark.slow
def test_a_worker_that_dies_is_said(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with pytest.raises(ExecutorError, match="broke down"), executor_of(cluster.scheduler_address) as executor:
        assert executor is not None
        executor.submit(os._exit, 1).result()


@pytest.mark.slow
def test_a_scheduler_without_workers_is_refused() -> None:
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50) as empty,
        pytest.raises(OptionError, match="has no workers"),
        executor_of(empty.scheduler_address),
    ):
        pass


@pytest.mark.slow
def test_a_local_process_that_dies_is_said() -> None:
    with pytest.raises(ExecutorError, match="ended early"), executor_of("2") as executor:
        assert executor is not None
        executor.submit(os._exit, 1).result()
