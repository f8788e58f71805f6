"""What runs each attention of a program: an emitted kernel by default, what was measured to be faster where a record
says so, and PyTorch's attention or the definition where there is no kernel.

A site is refused with the reason where no kernel was tested for it: its element type, head_dim, mask or bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from regraft.codegen.cpu.context import Context
from regraft.codegen.triton.attention_candidates import BACKENDS, lower_by, lower_kernel, sdpa_runs
from regraft.codegen.triton.attention_configs import Config
from regraft.codegen.triton.attention_site import Site, emit_attention, sites_of
from regraft.codegen.triton.attention_spec import AttentionSpec
from regraft.codegen.triton.emit import Kernel, Origin
from regraft.codegen.triton.tuner import KernelTuner
from regraft.codegen.triton.tuning_records import TuningRecord
from regraft.ir.program import Program

_WORDS = {name: f"PyTorch's attention ({name})" for name in BACKENDS} | {
    "sdpa": "PyTorch's attention",
    "flex": "FlexAttention",
    "definition": "the definition",
    "reference": "the definition",
}


@dataclass(frozen=True)
class Choice:
    """What runs a site: ``runs`` is "kernel", with its name; a word of ``tuning_records.CHOICES`` that was measured; or
    "sdpa" or "reference" with the reason against a kernel. ``record``: what it was measured from."""

    node: fx.Node
    runs: str
    kernel: str = ""
    reason: str = ""
    record: TuningRecord | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """The choices for a program, and the kernels that they name: one for all sites that ask for the same."""

    choices: dict[fx.Node, Choice] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    sites: dict[fx.Node, Site] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, tuner: KernelTuner) -> AttentionPlan:
        """Decide every attention of a program; emits, and builds nothing but what is measured."""
        plan = AttentionPlan()
        asked: dict[tuple[AttentionSpec, bool, tuple[tuple[str, Config], ...]], list[fx.Node]] = {}
        records = {}
        for site in sites_of(program.graph):
            plan.sites[site.node] = site
            record = records[site.node] = tuner.decide(site, program)
            if site.spec is not None and (record is None or record.choice == "kernel"):
                tiles = tuner.tiles(site.key) if tuner.records else {}
                asked.setdefault((site.spec, site.decode, tuple(sorted(tiles.items()))), []).append(site.node)
            else:
                plan.choices[site.node] = _without_kernel(site, record)
        for (spec, decode, tiles_), nodes in asked.items():
            kernel = emit_attention(spec, decode, tuple(map(Origin.of, nodes)), dict(tiles_))
            plan.kernels[kernel.name] = kernel
            plan.choices.update({node: Choice(node, "kernel", kernel.name, record=records[node]) for node in nodes})
        return plan

    def lower(self, context: Context, node: fx.Node) -> fx.Node:
        """Emit one site into the lowered graph."""
        choice, site = self.choices[node], self.sites[node]
        if choice.runs == "kernel":
            return lower_kernel(self.kernels[choice.kernel])(context, site.given)
        return lower_by(site, "definition" if choice.runs == "reference" else choice.runs)(context, site.given)


def _without_kernel(site: Site, record: TuningRecord | None) -> Choice:
    if record is None:
        return Choice(site.node, "sdpa" if sdpa_runs(site) else "reference", reason=site.reason)
    return Choice(site.node, record.choice, reason=site.reason or _slower(record), record=record)


def _slower(record: TuningRecord) -> str:
    """Why the kernel of a site is not taken: its time beside the one that is, or why it has none."""
    kernels = [seconds for name, seconds in record.seconds.items() if name.partition(" ")[0] == "kernel"]
    chosen = record.seconds.get(record.choice)
    where = f"on {record.device or record.arch}"
    if not kernels or chosen is None:
        return f"{where} it was left out ({record.left_out.get('kernel', 'it was not measured')})"
    return f"{where} it took {1e3 * min(kernels):.3g} ms, and {_WORDS[record.choice]} {1e3 * chosen:.3g} ms"


def refused_text(choice: Choice) -> str:
    """A refusal for the report: why no kernel, and what runs instead."""
    return f"no kernel: {choice.reason}; {_WORDS[choice.runs]} runs"
