"""Heat maps as SVG: the load of every rank and layer, and the traffic between nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: More cells than this would make a heavy page: ranks are then shown by node, each by its busiest rank.
MOST_CELLS = 6000
_MARGIN, _WIDTH, _SMALLEST, _LARGEST = 44.0, 480.0, 3.0, 18.0
#: A load of this many times the mean has the full colour; half a mean has it on the other side.
_FULL = 2.0


def load_map(load: Array, layer_ids: Sequence[int], node_of_rank: NDArray[np.int64], label: str) -> Markup:
    """Load over the layer's mean, ``load`` ``[layers, ranks]`` in tokens: blank is balance, red above, grey below."""
    ratio = load / np.maximum(load.mean(1, keepdims=True), 1e-12)
    what = "rank"
    if ratio.size > MOST_CELLS:
        what = "node"
        nodes = int(node_of_rank.max()) + 1
        ratio = np.stack([ratio[:, node_of_rank == node].max(1) for node in range(nodes)], axis=1)
    cells = [
        (_shade(float(value)), f"layer {layer}, {what} {place}: {value:.2f} times the mean")
        for layer, own in zip(layer_ids, ratio, strict=True)
        for place, value in enumerate(own)
    ]
    return _svg(cells, [str(layer) for layer in layer_ids], ratio.shape[1], label)


def traffic_map(traffic: Array, largest: float, label: str) -> Markup:
    """Copies per token from node to node, ``[nodes, nodes]``, summed over layers; ``largest`` has the full colour."""
    scale = max(largest, 1e-12)
    nodes = len(traffic)
    cells = [
        (
            ("hot", float(traffic[source, target]) / scale),
            f"node {source} to node {target}: {traffic[source, target]:.3f} copies per token",
        )
        for source in range(nodes)
        for target in range(nodes)
    ]
    return _svg(cells, [str(node) for node in range(nodes)], nodes, label)


def _shade(ratio: float) -> tuple[str, float]:
    """Class and opacity of a load: the logarithm of its ratio to the mean."""
    strength = math.log(max(ratio, 1e-6)) / math.log(_FULL)
    return ("hot" if strength >= 0 else "cold"), min(abs(strength), 1.0)


def _svg(cells: list[tuple[tuple[str, float], str]], rows: list[str], columns: int, label: str) -> Markup:
    """Cells row by row, each (class and opacity, tooltip)."""
    size = min(max(_WIDTH / columns, _SMALLEST), _LARGEST)
    width, height = _MARGIN + columns * size, len(rows) * size + 18.0
    drawn = []
    for number, ((kind, opacity), title) in enumerate(cells):
        x, y = _MARGIN + number % columns * size, number // columns * size
        drawn.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="{size:.1f}" class="{kind}" '
            f'fill-opacity="{opacity:.2f}"><title>{escape(title)}</title></rect>'
        )
    every = max(1, math.ceil(14.0 / size))
    texts = [
        f'<text x="{_MARGIN - 6:.0f}" y="{(at + 0.5) * size + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        for at, name in enumerate(rows)
        if at % every == 0
    ]
    last = f'<text x="{width:.0f}" y="{height - 3:.1f}" text-anchor="end">{columns - 1}</text>'
    first = f'<text x="{_MARGIN:.0f}" y="{height - 3:.1f}">0</text>'
    frame = (
        f'<rect x="{_MARGIN:.1f}" y="0" width="{columns * size:.1f}" height="{len(rows) * size:.1f}" class="frame"/>'
    )
    return Markup(
        f'<svg class="heat" role="img" aria-label="{escape(label)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width * 1.2:.0f}px">{"".join(drawn)}{frame}{"".join(texts)}{first}{last}</svg>'
    )
