"""What can run an attention site: its kernel with a few tiles, PyTorch's attention by back end, FlexAttention, and the
definition, which always can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from regraft.codegen.cpu.attention_sdpa import attend_sdpa, has_flag, lower_reference, lower_sdpa, sdpa_can
from regraft.codegen.cpu.context import Context
from regraft.codegen.triton.archs import line_for
from regraft.codegen.triton.attention_configs import Config, neighbours
from regraft.codegen.triton.attention_flex import flex_refuses, lower_flex
from regraft.codegen.triton.attention_site import Site, default_kernel, emit_attention
from regraft.codegen.triton.emit import Kernel
from regraft.codegen.triton.load import load_kernel
from regraft.ir import ops

#: PyTorch's back ends by the names that records give them.
BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
Lower = Callable[[Context, dict[str, Any]], fx.Node]


@dataclass(frozen=True)
class Candidate:
    """One way to run a site. ``choice`` is a word of ``tuning_records.CHOICES``, ``config`` the tiles of a kernel where
    they are not the default ones, ``lower`` what emits the site."""

    choice: str
    lower: Lower
    config: Config | None = None

    @property
    def name(self) -> str:
        """As it stands in a record's times."""
        return f"{self.choice} {' '.join(map(str, self.config))}" if self.config else self.choice


def candidates(site: Site, arch: str) -> list[Candidate]:
    """All that is worth trying for a site on an architecture, the default kernel first. The definition is not: it runs
    where nothing else does."""
    found = []
    if site.spec is not None:
        kernel = default_kernel(site.spec, site.decode)
        found.append(Candidate("kernel", lower_kernel(kernel)))
        default = line_for(kernel.entries[0].configs, arch)
        for config in neighbours(default) if default is not None else []:  # type: ignore[arg-type]
            made = emit_attention(site.spec, site.decode, tiles={arch: config})
            found.append(Candidate("kernel", lower_kernel(made), config))
    if sdpa_runs(site):
        found += [Candidate(name, lower_by(site, name, alone=True)) for name in BACKENDS]
    if flex_left_out(site) is None:
        found.append(Candidate("flex", lower_by(site, "flex")))
    return found


def flex_left_out(site: Site) -> str | None:
    """Why FlexAttention is not tried at a site: it cannot run it, or is not worth its compilation; None where it is."""
    if site.spec is None or site.node.target is not ops.attention:
        return site.reason or "it has no weights other than a softmax"
    if sdpa_runs(site) and has_flag(site.given):
        return "PyTorch's attention takes this mask as a flag"
    return flex_refuses(site.spec, site.given)


def runs(site: Site, choice: str) -> bool:
    """Whether a site can be run so."""
    if choice == "kernel":
        return site.spec is not None
    if choice == "flex":
        return site.node.target is ops.attention and site.spec is not None and not flex_refuses(site.spec, site.given)
    return choice == "definition" or sdpa_runs(site)


def sdpa_runs(site: Site) -> bool:
    """Whether PyTorch's attention can express a site."""
    return site.node.target is ops.attention and sdpa_can(site.given) and site.given["sinks"] is None


def lower_by(site: Site, choice: str, alone: bool = False) -> Lower:
    """What emits a site without a kernel of its own: by a back end (``alone``: by it or not at all, else by another
    where it refuses a call), by "sdpa" as PyTorch chooses, by "flex", or by its "definition"."""
    if choice == "definition":
        return lambda context, given: lower_definition(context, site.node.target, given)
    if choice == "flex":
        spec = site.spec
        assert spec is not None
        return lambda context, given: lower_flex(context, given, spec)
    attend = attend_sdpa if choice == "sdpa" else _ATTEND[choice, alone]
    return lambda context, given: lower_sdpa(context, given, attend)


def lower_definition(context: Context, target: Any, given: dict[str, Any]) -> fx.Node:
    """The definition of an operator, op by op."""
    if target is ops.attention:
        return lower_reference(context, given)
    return context.call(target, **{name: fx.map_arg(value, context.value) for name, value in given.items()})


def lower_kernel(kernel: Kernel) -> Lower:
    """What emits a call of a kernel's operator."""
    return lambda context, given: context.call(
        operator_of(kernel), *(_operand(context, given, name) for name in kernel.operands)
    )


def operator_of(kernel: Kernel) -> Any:
    """The operator that an emitted file registers, as graphs name it."""
    return load_kernel(kernel).operator._opoverload


def _operand(context: Context, given: dict[str, Any], name: str) -> Any:
    if name.startswith("mask_"):
        return context.value(given["mask_tensors"][int(name.removeprefix("mask_"))])
    value = given[name]
    return context.value(value) if isinstance(value, fx.Node) else float(value)


def _attending(name: str, alone: bool) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        first = getattr(SDPBackend, BACKENDS[name])
        rest = [] if alone else [getattr(SDPBackend, other) for other in BACKENDS.values()]
        with sdpa_kernel([first, *(other for other in rest if other != first)], set_priority=True):
            return attend_sdpa(query, key, value, *options)

    attend.__name__ = attend.__qualname__ = f"attend_{name}{'_alone' if alone else ''}"
    return attend


_ATTEND = {(name, alone): _attending(name, alone) for name in BACKENDS for alone in (False, True)}
