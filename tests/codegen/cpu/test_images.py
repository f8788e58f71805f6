"""What PyTorch computes pixel by pixel on an image is computed by lines on the CPU, and windows are views of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regraft.codegen.cpu.lower import lower
from tests.codegen.cpu.support import needs_native
from tests.support import captured

Function = Callable[[Tensor], Tensor]


def draw(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def lowered(function: Function, x: Tensor) -> tuple[Function, str]:
    """The executable of a function, and the code that it runs."""
    executable = lower(captured(function, (x,)))
    return lambda x: executable(x)[0], str(executable.module.graph)


def lowered_for_any_batch(function: Function, x: Tensor) -> tuple[Function, str]:
    """The same for a symbolic batch, which is still one afterwards: another batch is not captured anew."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = captured(function, (x,), (({0: batch},),))
    executable = lower(program)
    (given,) = program.user_inputs()
    assert isinstance(given.meta["val"].shape[0], torch.SymInt)
    return lambda x: executable(x)[0], str(executable.module.graph)


def means(x: Tensor, rows: int, columns: int) -> Tensor:
    """Means of cells by their formula, in fp64."""
    *leading, height, width = x.shape
    cells = x.double().reshape(*leading, height // rows, rows, width // columns, columns)
    return cells.sum((-3, -1)) / (rows * columns)


@pytest.mark.parametrize(
    ("function", "rows", "columns"),
    [
        (lambda x: F.adaptive_avg_pool2d(x, (8, 4)), 5, 10),
        (lambda x: F.adaptive_avg_pool2d(x, (20, None)), 2, 1),
        (lambda x: F.avg_pool2d(x, 4), 4, 4),
        (lambda x: F.avg_pool2d(x, (2, 5), (2, 5), ceil_mode=True, count_include_pad=False), 2, 5),
    ],
)
@pytest.mark.parametrize("leading", [(3, 8), (24,)])
def test_a_mean_over_cells_that_tile_the_image(
    function: Function, rows: int, columns: int, leading: tuple[int]
) -> None:
    x = draw(*leading, 40, 40)
    run, code = lowered(function, x)
    assert "mean_of_cells" in code
    torch.testing.assert_close(run(x).double(), means(x, rows, columns), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_avg_pool2d(x, 7),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.adaptive_avg_pool2d(x, 80),
        lambda x: F.avg_pool2d(x, 3),
        lambda x: F.avg_pool2d(x, 4, 2),
        lambda x: F.avg_pool2d(x, 4, padding=1),
        lambda x: F.avg_pool2d(x, 4, divisor_override=3),
        lambda x: F.adaptive_avg_pool2d(x[..., :8], (5, 2)),
        lambda x: F.adaptive_avg_pool2d(x.double(), 8),
        lambda x: F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (4, 8)),
        lambda x: F.adaptive_avg_pool2d(x[:1], 8),
    ],
    ids=[
        "pixels are in two cells",
        "all pixels",
        "more cells than pixels",
        "pixels are left over",
        "windows overlap",
        "padding",
        "another divisor",
        "many short lines",
        "fp64",
        "channels are dense",
        "few pixels",
    ],
)
def test_other_means_stay_pytorchs(function: Function) -> None:
    x = draw(4, 8, 40, 40)
    run, code = lowered(function, x)
    assert "mean_of_cells" not in code
    assert torch.equal(run(x), function(x))


def test_means_of_cells_of_any_batch_and_layout() -> None:
    run, code = lowered_for_any_batch(lambda x: F.adaptive_avg_pool2d(x, 8), draw(4, 8, 40, 40))
    assert "mean_of_cells" in code
    turned = draw(5, 40, 40, 8).permute(0, 3, 1, 2)
    for x in (draw(1, 8, 40, 40), draw(7, 8, 40, 40), turned):
        torch.testing.assert_close(run(x).double(), means(x, 5, 5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 8])
def test_a_pixel_that_is_no_number_makes_its_cell_none(rows: int) -> None:
    x = draw(4, 8, 40, 40)
    x[1, 2, 3, 4], x[2, 3, 39, 39], x[2, 3, 38, 39] = torch.nan, torch.inf, -torch.inf
    run, _ = lowered(lambda x: F.avg_pool2d(x, rows), x)
    assert torch.equal(run(x).isnan(), F.avg_pool2d(x, rows).isnan())
    assert run(x).isnan().sum() == 2


@needs_native
@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda x: F.unfold(x, 3, padding=1), (2, 8, 16, 16)),
        (lambda x: F.unfold(x, (3, 5), padding=(0, 2), stride=(2, 1)), (2, 16, 16, 15)),
        (lambda x: F.unfold(x, 4, stride=4), (2, 8, 64, 64)),
        (lambda x: F.unfold(x, 3), (32, 16, 16)),
        (lambda x: F.unfold(x.permute(0, 3, 1, 2), 3, padding=1), (2, 16, 16, 8)),
    ],
    ids=["neighbours", "two sizes", "patches", "one image", "channels are dense"],
)
def test_windows_are_one_copy(function: Function, sizes: tuple[int, ...]) -> None:
    x = draw(*sizes)
    run, code = lowered(function, x)
    assert "im2col" not in code and "reshaped_native" in code
    assert torch.equal(run(x), function(x))


@needs_native
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.unfold(x, 3, dilation=2),
        lambda x: F.unfold(x, 3, stride=(1, 4)),
        lambda x: F.unfold(x, (3, 14)),
        lambda x: F.unfold(x.double(), 3),
        lambda x: F.unfold(x[:1, :8], 3),
    ],
    ids=["holes", "few windows with gaps", "few windows", "fp64", "few numbers"],
)
def test_other_windows_stay_pytorchs(function: Function) -> None:
    x = draw(2, 64, 16, 16)
    run, code = lowered(function, x)
    assert "im2col" in code
    assert torch.equal(run(x), function(x))


@needs_native
def test_windows_of_any_batch_and_layout() -> None:
    run, code = lowered_for_any_batch(lambda x: F.unfold(x, 3, padding=1), draw(4, 8, 16, 16))
    assert "reshaped_native" in code
    turned = draw(5, 16, 16, 8).permute(0, 3, 1, 2)
    for x in (draw(1, 8, 16, 16), draw(7, 8, 16, 16), turned):
        assert torch.equal(run(x), F.unfold(x, 3, padding=1))


def scores(x: Tensor, heads: int, merged: bool = True) -> Tensor:
    """Products of each pixel and those around it, ``[batch, heads, pixels, 1, 9]``; without a dim of one head."""
    batch, width, height, across = x.shape
    sizes = (batch, width, 9, height * across) if merged else (batch, heads, width // heads, 9, height * across)
    near = F.unfold(x, 3, padding=1).reshape(sizes)
    pixels = x.reshape(*sizes[:-2], height * across)
    return pixels.mT[..., None, :] @ near.movedim(-1, -3)


@needs_native
def test_a_product_reads_windows_where_the_image_lies() -> None:
    x = draw(2, 16, 12, 12)
    run, code = lowered(lambda x: scores(x, 1), x)
    assert "windows_native" in code and "reshaped_native" not in code
    torch.testing.assert_close(run(x), scores(x, 1), rtol=1e-5, atol=1e-5)


@needs_native
def test_a_product_that_has_too_many_dims_reads_the_copy_of_windows() -> None:
    x = draw(2, 16, 12, 12)
    run, code = lowered(lambda x: scores(x, 2, merged=False), x)
    assert "batched_native" in code and "reshaped_native" in code
    torch.testing.assert_close(run(x), scores(x, 2, merged=False), rtol=1e-5, atol=1e-5)


@needs_native
def test_windows_that_others_read_too_are_copied_for_them() -> None:
    x = draw(2, 16, 12, 12)

    def function(x: Tensor) -> Tensor:
        return scores(x, 1).sum() + F.unfold(x, 3, padding=1)

    run, code = lowered(function, x)
    assert "windows_native" in code and "reshaped_native" in code
    torch.testing.assert_close(run(x), function(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda x: F.fold(x, (32, 32), 3, padding=1), (4, 72, 1024)),
        (lambda x: F.fold(x, (32, 31), (3, 2)), (4, 96, 900)),
        (lambda x: F.fold(x, (32, 32), 5, padding=(3, 0)), (32, 25, 34 * 28)),
        (lambda x: F.fold(x, (1, 1024), (5, 3), padding=(2, 1)), (16, 60, 1024)),
        (lambda x: F.fold(x, (32, 32), 3, padding=1), (360, 1024)),
        (lambda x: F.fold(x.mT, (32, 32), 3, padding=1), (4, 1024, 72)),
    ],
    ids=["neighbours", "two sizes", "much padding", "taps that no pixel lies under", "one image", "channels are dense"],
)
def test_windows_at_every_pixel_are_added_up_to_the_bit(function: Function, sizes: tuple[int, ...]) -> None:
    x = draw(*sizes)
    run, code = lowered(function, x)
    assert "fold_windows" in code and "col2im" not in code
    assert torch.equal(run(x), function(x)) and run(x).is_contiguous()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.fold(x, (45, 45), 7, stride=2),
        lambda x: F.fold(x, (32, 32), 7, dilation=2),
        lambda x: F.fold(x.double(), (26, 26), 7),
        lambda x: F.fold(x[:4], (26, 26), 7),
        lambda x: F.fold(x, (400, 7), (1, 7)),
        lambda x: F.fold(x.repeat(1, 2, 1), (26, 33), (7, 14)),
    ],
    ids=["gaps", "holes", "fp64", "few pixels", "short lines", "many taps"],
)
def test_other_sums_of_windows_stay_pytorchs(function: Function) -> None:
    x = draw(64, 49, 400)
    run, code = lowered(function, x)
    assert "fold_windows" not in code
    assert torch.equal(run(x), function(x))


def test_windows_of_any_batch_are_added_up() -> None:
    run, code = lowered_for_any_batch(lambda x: F.fold(x, (32, 32), 3, padding=1), draw(4, 72, 1024))
    assert "fold_windows" in code
    for x in (draw(1, 72, 1024), draw(7, 72, 1024)):
        assert torch.equal(run(x), F.fold(x, (32, 32), 3, padding=1))
