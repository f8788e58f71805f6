"""A process group ends with ``destroy_process_group``, whatever was loaded while it lived."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys, torch, torch.distributed as dist
from pathlib import Path

def threads():
    return [task.name for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]

{before}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones(2))
{behind}
from regraft.api import compile
compile(torch.nn.Linear(2, 2).eval(), (torch.ones(3, 2),))
assert "torch._dynamo" in sys.modules and threads()
dist.destroy_process_group()
assert not threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are named in /proc")
@pytest.mark.parametrize(
    ("before", "behind"),
    [("", ""), ("import regraft", ""), ("from regraft.api import compile", ""), ("", "import torch._dynamo")],
    ids=["compiled", "the face loaded before", "the compiler loaded before", "Dynamo loaded by another"],
)
def test_no_thread_of_a_group_is_left(before: str, behind: str) -> None:
    """In a process of its own: here all may be loaded long since."""
    code = CODE.format(before=before, behind=behind)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
