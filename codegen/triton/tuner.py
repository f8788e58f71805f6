"""What runs each attention of a program: as a record says, by measurement where a device is at hand, else by default.

Measured is only where a program is compiled, never where one is loaded: serving takes what was decided.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from regraft.codegen.triton.archs import arch_of, target_arch
from regraft.codegen.triton.attention_candidates import runs
from regraft.codegen.triton.attention_configs import Config
from regraft.codegen.triton.attention_site import Site
from regraft.codegen.triton.attention_trial import measured
from regraft.codegen.triton.tuning_records import SiteKey, TuningRecord, from_lines, to_lines
from regraft.codegen.triton.workbench import Workbench, found_workbench
from regraft.ir.capture_error import first_line
from regraft.ir.program import Program


class KernelTuner:
    """Decides, and remembers why.

    ``arch`` is the architecture that is decided for: of the bench, else of the device that the program is on, else of
    the target. With none of these (a bare "cuda" where no device is) it is that of the records, if they have one only.
    """

    def __init__(
        self,
        records: Iterable[TuningRecord] = (),
        bench: Workbench | None = None,
        arch: str | None = None,
    ) -> None:
        self.records = {(record.key, record.arch): record for record in records}
        self.bench = bench
        archs = {arch for _, arch in self.records}
        self.arch = bench.arch if bench is not None else arch or (archs.pop() if len(archs) == 1 else None)
        self._failure = ""

    @staticmethod
    def of(program: Program, target: str, lines: bytes = b"", measures: bool = True) -> KernelTuner:
        """For a program and a target, with the records of an artifact's ``tuning.jsonl``; raises ``TuningError``."""
        bench = found_workbench(target) if measures else None
        return KernelTuner(from_lines(lines), bench, _arch_of(program) or target_arch(target))

    def decide(self, site: Site, program: Program) -> TuningRecord | None:
        """The record that says what runs a site; None where there is none, and nothing to measure on."""
        if self.bench is None and not self.records:
            return None
        key = site.key
        known = self.records.get((key, self.arch or ""))
        if known is None and self.bench is not None:
            try:
                known = self.records[key, self.bench.arch] = measured(site, program, self.bench)
            except RuntimeError as error:  # the device's memory does not hold the sample, say
                self._failure = first_line(error)
        return known if known is not None and runs(site, known.choice) else None

    def tiles(self, key: SiteKey) -> dict[str, Config]:
        """The tiles of a site's kernel on each architecture that was measured; launchers pick their own."""
        return {record.arch: record.config for record in self.records.values() if record.key == key and record.config}

    def notes(self, undecided: int) -> tuple[str, ...]:
        """What to tell where ``undecided`` attentions have no record."""
        if not undecided:
            return ()
        others = sorted({arch for _, arch in self.records} - {self.arch})
        if others:
            where = self.arch or "unknown"
            return (
                f"tuning records are for {', '.join(others)}, and the architecture is {where}: they are not used, and "
                f"{undecided} attentions run what is chosen by default",
            )
        why = "no GPU of the target is at hand"
        if self.bench is not None:
            why = f"measuring on {self.bench.name} failed ({self._failure or 'a record does not fit its site'})"
        return (f"{why}: {undecided} attentions run what is chosen by default, and were not measured",)

    def to_lines(self) -> bytes:
        """All records, as an artifact holds them."""
        return to_lines(self.records.values())


def _arch_of(program: Program) -> str | None:
    """The architecture of the GPU that a program is on; None on a CPU."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.device.type == "cuda":
            return arch_of(value.device) if torch.cuda.is_available() else None
    return None
