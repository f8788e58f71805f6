"""A command that torchrun started once for every rank: its process group, and ``{rank}`` in the names of files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from regraft.cli.common import UsageFault

MARK = "{rank}"


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started; one of one where it did not."""

    number: int = 0
    ranks: int = 1
    launched: bool = False

    def own(self, path: Path) -> Path:
        """The path with this rank's number in it; raises ``UsageFault`` without ranks."""
        if MARK not in str(path):
            return path
        if not self.launched:
            raise UsageFault(
                f"{path} was given, and without torchrun there are no ranks; run under torchrun --nproc-per-node N, "
                f"or write the number instead of {MARK}"
            )
        return Path(str(path).replace(MARK, str(self.number)))

    def own_output(self, path: Path) -> Path:
        """The same for a file to write, which must differ from rank to rank."""
        if self.ranks > 1 and MARK not in str(path):
            raise UsageFault(f"{self.ranks} ranks would write the one file {path}; put {MARK} into its name")
        return self.own(path)


@contextlib.contextmanager
def joined() -> Iterator[Rank]:
    """Join the process group of all that torchrun started. A rank that fails leaves without a word to the others:
    torchrun ends them."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Rank()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield Rank(dist.get_rank(), dist.get_world_size(), launched=True)
    dist.destroy_process_group()
