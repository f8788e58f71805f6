"""TensorRT-LLM: ``moe_config.load_balancer: FILE.yaml`` (released), assignments by true layer id.

The configuration class takes no unknown keys, so exactly three are written. YAML is written and read here in the small
part that the file needs: numbers, and lists in brackets or as dashes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from regraft.solvers.placement.errors import PlacementError
from regraft.solvers.placement.exports.files import check_layers, full_slots, read_text, whole_rows
from regraft.solvers.placement.plan import Plan
from regraft.solvers.placement.whole import write_text

KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")


def write_tensorrt_llm(plan: Plan, path: Path | str) -> None:
    """Write the file; 0 updates per iteration keep the placement as it is."""
    slots = full_slots(plan, "TensorRT-LLM")
    lines = [f"num_slots: {slots.shape[1]}", "initial_global_assignments:"]
    for layer, row in zip(plan.layer_ids, slots.tolist(), strict=True):
        lines.append(f"  {layer}: [{', '.join(map(str, row))}]")
    lines.append("layer_updates_per_iter: 0")
    write_text(path, "\n".join(lines) + "\n")


def read_tensorrt_llm_plan(path: Path | str, num_ranks: int, layer_ids: Sequence[int], num_hidden_layers: int) -> Plan:
    """Read the file back. Raises ``PlacementError`` for other keys, missing layers or lengths that disagree."""
    name = Path(path).name
    numbers, rows = _parse(read_text(path), name)
    if set(numbers) | ({KEYS[1]} if rows else set()) != set(KEYS):
        raise PlacementError(f"{name!r} has {sorted(numbers)}; TensorRT-LLM takes exactly {', '.join(KEYS)}")
    check_layers(len(rows), layer_ids, name)
    if tuple(rows) != tuple(layer_ids):
        raise PlacementError(f"{name!r} places layers {list(rows)}; expected true layer ids {list(layer_ids)}")
    slots = whole_rows(list(rows.values()), name)
    if slots.shape[1] != numbers["num_slots"]:
        raise PlacementError(f"{name!r} has num_slots {numbers['num_slots']} and {slots.shape[1]} slots in a layer")
    return Plan.of_array(slots, int(slots.max()) + 1, num_ranks, layer_ids, num_hidden_layers)


def _parse(text: str, name: str) -> tuple[dict[str, int], dict[int, list[int]]]:
    """Numbers by key at the top, and lists by layer below ``initial_global_assignments``."""
    numbers: dict[str, int] = {}
    rows: dict[int, list[int]] = {}
    current: list[int] | None = None
    for line in _joined_lines(text):
        top = re.fullmatch(r"(\w+):\s*(\d*)", line)
        flow = re.fullmatch(r"\s+['\"]?(\d+)['\"]?:\s*\[([\d,\s]*)\]", line)
        block = re.fullmatch(r"\s+['\"]?(\d+)['\"]?:", line)
        item = re.fullmatch(r"\s*-\s*(\d+)", line)
        if top:
            if top[2]:
                numbers[top[1]] = int(top[2])
            elif top[1] != KEYS[1]:
                raise PlacementError(f"{name!r} has a key {top[1]!r} without a number")
        elif flow:
            rows[int(flow[1])] = [int(entry) for entry in flow[2].replace(",", " ").split()]
        elif block:
            current = rows.setdefault(int(block[1]), [])
        elif item and current is not None:
            current.append(int(item[1]))
        else:
            raise PlacementError(f"{name!r} has a line {line.strip()[:40]!r}; expected a load balancer configuration")
    return numbers, rows


def _joined_lines(text: str) -> list[str]:
    """Lines without comments and blanks; a bracketed list is one line."""
    joined: list[str] = []
    for line in text.splitlines():
        bare = re.sub(r"\s+#.*$|^#.*$", "", line).rstrip()
        if not bare.strip() or bare.strip() in ("---", "..."):
            continue
        if joined and joined[-1].count("[") > joined[-1].count("]"):
            joined[-1] += " " + bare.strip()
        else:
            joined.append(bare)
    return joined
