"""The default order of passes: the one place where it is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from regraft.ir.driver import Session
from regraft.ir.program import Program
from regraft.ir.rule import Rule
from regraft.passes.base import Pass, Pipeline, RulePass
from regraft.passes.canonicalize.cleanup import DropDeadCode, MergeCommonSubexpressions
from regraft.passes.canonicalize.pipeline import PASSES as CANONICALIZE
from regraft.passes.fuse.convolution import FoldNormIntoLast, FoldNormIntoNext, FoldResidualOfDepthwise
from regraft.passes.fuse.dead_output import DropUnreadColumns, DropUnreadRows
from regraft.passes.fuse.fold_constants import FoldConstants
from regraft.passes.fuse.linear_epilogue import LinearActivation, LinearResidual
from regraft.passes.fuse.linear_rows import LinearOfAllRows
from regraft.passes.fuse.merge_linears import MergeLinears
from regraft.passes.fuse.residual_norm import FuseResidualNorm
from regraft.passes.recognize.activation import RecognizeQuickGelu, RecognizeReluSquared, RecognizeSilu
from regraft.passes.recognize.attention import RecognizeAttention
from regraft.passes.recognize.attention_joined import JoinHeads
from regraft.passes.recognize.attention_mapped import RecognizeMappedAttention
from regraft.passes.recognize.attention_reversed import RecognizeReversedAttention
from regraft.passes.recognize.count import CountSites
from regraft.passes.recognize.gelu import RecognizeGelu, RecognizeGeluTanh
from regraft.passes.recognize.glu import RecognizeGlu, RecognizeTorchGlu
from regraft.passes.recognize.layer_norm import RecognizeLayerNorm
from regraft.passes.recognize.layer_norm_channels import RecognizeChannelNorm
from regraft.passes.recognize.left import ReportLeftSites
from regraft.passes.recognize.linear_scan import RecognizeLinearScan
from regraft.passes.recognize.moe import RecognizeMoe
from regraft.passes.recognize.moe_axis import RecognizeMoeAxis
from regraft.passes.recognize.moe_left import DropCountChecks, ReportLeftExperts
from regraft.passes.recognize.moe_loop import RecognizeMoeLoop
from regraft.passes.recognize.rms_norm import RecognizeRmsNorm
from regraft.passes.recognize.rms_norm_call import RecognizeRmsNormCall
from regraft.passes.recognize.rms_norm_length import RecognizeRmsNormByLength, RecognizeRmsNormOfUnit
from regraft.passes.recognize.rope import RecognizeRope
from regraft.passes.recognize.rope_complex import RecognizeRopeComplex
from regraft.passes.recognize.rope_pairs import RecognizeRopePairs
from regraft.passes.recognize.sdpa import RecognizeSdpa


@dataclass(frozen=True)
class RecognizeRowwise(RulePass):
    """Activations, norms and rope written out: later patterns read them as one node."""

    rules: ClassVar[Sequence[Rule]] = (
        RecognizeSilu(),
        RecognizeQuickGelu(),
        RecognizeReluSquared(),
        RecognizeGelu(),
        RecognizeGeluTanh(),
        RecognizeRope(),
        RecognizeRopePairs(),
        RecognizeRopeComplex(),
        RecognizeLayerNorm(),  # before RMSNorm: a centred value's RMS is an RMSNorm too
        RecognizeChannelNorm(),
        RecognizeRmsNormCall(),
        RecognizeRmsNormByLength(),
        RecognizeRmsNorm(),
        RecognizeRmsNormOfUnit(),
    )


@dataclass(frozen=True)
class RecognizeBlocks(RulePass):
    """Experts, attention and gated linear units."""

    rules: ClassVar[Sequence[Rule]] = (
        RecognizeMoe(),
        RecognizeMoeAxis(),
        RecognizeMoeLoop(),
        RecognizeAttention(),
        RecognizeSdpa(),
        RecognizeMappedAttention(),
        RecognizeReversedAttention(),
        JoinHeads(),
        RecognizeTorchGlu(),
        RecognizeGlu(),
        RecognizeLinearScan(),
    )


@dataclass(frozen=True)
class DropUnread(RulePass):
    """Rows and columns that nobody reads."""

    rules: ClassVar[Sequence[Rule]] = (DropUnreadRows(), DropUnreadColumns())

    def run(self, program: Program, session: Session) -> int:
        """Until nothing changes: two cuts of one tensor, as a residual and its branch make, are read as one then."""
        total = 0
        while fired := super().run(program, session):
            MergeCommonSubexpressions().run(program, session)
            total += fired
        return total


@dataclass(frozen=True)
class FoldConvolutions(RulePass):
    """Batch norms and residuals that become weights of the convolution beside them."""

    rules: ClassVar[Sequence[Rule]] = (FoldNormIntoNext(), FoldNormIntoLast(), FoldResidualOfDepthwise())


@dataclass(frozen=True)
class FuseLinears(RulePass):
    """Linear layers of one input merged, epilogues joined to the layer before them."""

    rules: ClassVar[Sequence[Rule]] = (LinearActivation(), LinearResidual(), LinearOfAllRows(), MergeLinears())


@dataclass(frozen=True)
class FuseLinearsOnCpu(RulePass):
    """The same for a CPU, where a merged gate and up projection was measured to lose."""

    rules: ClassVar[Sequence[Rule]] = (
        LinearActivation(),
        LinearResidual(),
        LinearOfAllRows(),
        MergeLinears(merge_gates=False),
    )


@dataclass(frozen=True)
class FuseNorms(RulePass):
    """Residual sums that no linear layer took, with the norm that follows."""

    rules: ClassVar[Sequence[Rule]] = (FuseResidualNorm(),)


def recognising(experts: Pass | None = None) -> Pipeline:
    """The canonical form and the recognised blocks; ``experts`` places the experts once they are recognised."""
    return Pipeline(
        (
            *CANONICALIZE,
            RecognizeRowwise(),
            RecognizeBlocks(),
            DropCountChecks(),
            ReportLeftExperts(),
            ReportLeftSites(),
            CountSites(),
            *((experts,) if experts is not None else ()),
            MergeCommonSubexpressions(),
        )
    )


def finishing(target: str = "cpu") -> Pipeline:
    """From recognised blocks to what is lowered for ``target``."""
    return Pipeline(
        (
            DropUnread(),
            FoldConvolutions(),
            FuseLinearsOnCpu() if target.startswith("cpu") else FuseLinears(),
            FuseNorms(),
            FoldConstants(),
            DropDeadCode(),
        )
    )


def default_pipeline(target: str = "cpu", experts: Pass | None = None, tokens: Sequence[Pass] = ()) -> Pipeline:
    """Exact passes, in order, for ``target``; ``experts`` places the experts once they are recognised, and ``tokens``
    are passes on the token axis, which run on recognised blocks before linear layers are merged."""
    return Pipeline((*recognising(experts).passes, *tokens, *finishing(target).passes))
