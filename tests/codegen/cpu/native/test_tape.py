"""Laying out memory for a sequence of calls."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.codegen.cpu.native.tape import _Buffer, _lay_out


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=20))
def test_what_is_needed_at_the_same_time_does_not_overlap(sizes: list[tuple[int, int, int]]) -> None:
    buffers = [
        _Buffer(torch.empty(size, dtype=torch.uint8, device="meta"), first, first + steps)
        for size, first, steps in sizes
    ]
    total = _lay_out(buffers)
    for place, one in enumerate(buffers):
        assert one.offset >= 0 and one.offset + one.size <= total and one.offset % 64 == 0
        for other in buffers[:place]:
            together = one.first <= other.last and other.first <= one.last
            apart = one.offset + one.size <= other.offset or other.offset + other.size <= one.offset
            assert apart or not together


def test_a_chain_takes_the_room_of_two_neighbours() -> None:
    buffers = [_Buffer(torch.empty(640, dtype=torch.uint8, device="meta"), step, step + 1) for step in range(50)]
    assert _lay_out(buffers) == 2 * 640
