"""How rows of tokens, and parts of a result, reach other ranks of a process group of ``torch.distributed``.

A group is named in the graph: ``WORLD`` is the default group of whoever runs it, ``ALONE`` no group at all, where this
process plays every rank and nothing is sent. What a rank sends is told to whoever counts (``regraft.ir.copies``).
"""

from __future__ import annotations

from inspect import isfunction
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from regraft.ir.errors import RegraftError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALONE = ""
WORLD = "world"


class GroupError(RegraftError, RuntimeError):
    """Code for one rank of a group runs where there is no such group, or as another rank of it."""


def _let_groups_end() -> None:
    """Let ``destroy_process_group`` end the threads of a group that was made before the first compilation.

    ``torch.distributed.nn.functional``, which ``torch._dynamo`` loads, takes the default group of that moment as the
    default argument of its functions. Loaded behind ``init_process_group`` it holds that group as long as the process
    lives, and its threads still run when the process ends.
    """
    if not dist.is_available():
        return
    from torch.distributed.nn import functional

    for function in vars(functional).values():
        if isfunction(function) and function.__defaults__:
            given = function.__defaults__
            function.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in given)


def group_of(name: str, ranks: int, rank: int) -> ProcessGroup:
    """The group called ``name``. Raises ``GroupError`` where it is missing, not of ``ranks`` processes, or this process
    is not its ``rank``."""
    how = f"run it as rank {rank} under torchrun --nproc-per-node {ranks}"
    what = f"this code is rank {rank} of a model that is sharded over {ranks} ranks"
    if not dist.is_available() or not dist.is_initialized():
        raise GroupError(
            f"{what}, and no process group is initialised; call torch.distributed.init_process_group and {how}"
        )
    try:
        group = dist.group.WORLD if name == WORLD else dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
    except Exception as error:
        raise GroupError(f"{what} of the process group {name!r}, which does not exist here; create it first") from error
    assert group is not None
    if group.size() != ranks:
        raise GroupError(f"{what}, and the process group has {group.size()}; {how}")
    if group.rank() != rank:
        raise GroupError(f"{what}, and this process is rank {group.rank()}; give each process the code of its own rank")
    return group


def exchange_counts(sent: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows come from each rank, ``[ranks]``, when ``sent [ranks]`` go to each."""
    ones = [1] * sent.shape[0]
    return exchange(sent, ones, ones, group)


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """Rows ``[sum(received), …]`` in the order of their source ranks; ``rows [sum(sent), …]`` lie in the order of the
    ranks that they go to."""
    from torch.distributed import _functional_collectives as collectives

    arriving = collectives.all_to_all_single(rows.contiguous(), received, sent, group)
    arrived: Tensor = collectives.wait_tensor(arriving)
    return arrived


def gather_parts(part: Tensor, group: ProcessGroup) -> Tensor:
    """``[ranks, *part.shape]``: every rank's part, of one shape, in the order of the ranks."""
    from torch.distributed import _functional_collectives as collectives

    rows = part.contiguous().reshape(1, *part.shape)
    gathered: Tensor = collectives.wait_tensor(collectives.all_gather_tensor(rows, 0, group))
    return gathered


_let_groups_end()
