"""The mean loss of samples, and how large that of the data they were drawn from may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_CLEAR = 3.0  # one of some dozens that are compared may seem better by two by chance


@dataclass(frozen=True)
class Estimate:
    """The mean over ``samples``, an upper bound of the true mean at the confidence that was asked for, and what is
    ``typical``, by which rewrites are compared."""

    mean: float
    upper: float
    samples: int
    typical: float

    def within(self, limit: float) -> bool:
        """Whether the true mean is at most ``limit``, as far as these samples can tell; false for NaN."""
        return self.upper <= limit


def estimate(losses: NDArray[np.float64], confidence: float, rate: bool = False) -> Estimate:
    """The estimate from independent samples.

    Student's bound with the term for skewness (Hall, "On the removal of skewness by transformation", JRSS B 1992), of
    the samples and one more that is as large as the largest of them. A divergence is small for most samples and large
    for the few near a decision, and how many of these there are is just what few samples do not tell: Student's bound
    alone is exceeded several times as often as it says.

    For a ``rate`` of errors whose samples are all 0 or 1 it is that of Clopper and Pearson ("The use of confidence or
    fiducial limits", Biometrika 1934): no error in n samples leaves a rate of 4.6/n possible at a confidence of 99 %.
    """
    count = len(losses)
    mean, own = float(losses.mean()) if count else math.nan, typical(losses, rate)
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean, math.nan if math.isnan(mean) else math.inf, count, own)
    if rate and bool(np.isin(losses, (0.0, 1.0)).all()):
        return Estimate(mean, rate_bound(int(losses.sum()), count, confidence), count, own)
    return Estimate(mean, _mean_bound(np.append(losses, losses.max()), confidence), count, own)


def confidence_of_look(confidence: float, look: int) -> float:
    """The confidence of the bound of look number ``look`` (1, 2, …) at held-out data, so that all looks together keep
    ``confidence``: whoever looks until something passes is wrong oftener than each look is.

    Look k spends the part 1/(k (k+1)) of what may go wrong. These parts add up to one however many looks follow
    (Bonferroni's bound; Lan and DeMets, "Discrete sequential boundaries for clinical trials", Biometrika 1983), and
    half goes to the first look, which mostly is the only one.
    """
    return 1.0 - (1.0 - confidence) / (look * (look + 1))


def typical(losses: NDArray[np.float64], rate: bool = False) -> float:
    """The square of the mean root; for a ``rate`` the mean.

    A mean of KL divergences is that of the few samples near a decision: which of two rewrites has the smaller one is
    an accident of the data. Roots grow with how far an output moved, and every sample has its say.
    """
    if not losses.size:
        return math.nan
    return float(losses.mean() if rate else np.sqrt(np.maximum(losses, 0.0)).mean() ** 2)


def is_clearly_less(losses: NDArray[np.float64], others: NDArray[np.float64], rate: bool = False) -> bool:
    """Whether a rewrite loses less than another on the same samples, by more than ``_CLEAR`` standard errors of what
    each sample says of both: of the roots, as above, for a ``rate`` of the losses."""
    if len(losses) != len(others) or len(losses) < 2:
        return False
    less, more = (values if rate else np.sqrt(np.maximum(values, 0.0)) for values in (losses, others))
    gain = more - less
    return bool(gain.mean() > _CLEAR * gain.std(ddof=1) / math.sqrt(len(gain)))


def _mean_bound(losses: NDArray[np.float64], confidence: float) -> float:
    """A number that the mean of what ``losses`` are drawn from exceeds about as rarely as ``confidence`` says."""
    count, mean, deviation = len(losses), float(losses.mean()), float(losses.std(ddof=1))
    if deviation == 0.0:
        return mean
    skewness = max(float((((losses - mean) / deviation) ** 3).mean()), 0.0)
    quantile = _student(confidence, count - 1)
    return mean + (quantile + skewness * (2 * quantile**2 + 1) / (6 * math.sqrt(count))) * deviation / math.sqrt(count)


def rate_bound(errors: int, count: int, confidence: float) -> float:
    """The largest rate at which ``errors`` or fewer of ``count`` are not less likely than one minus ``confidence``."""
    if errors >= count:
        return 1.0
    return _root(lambda rate: _binomial(errors, count, rate) - (1 - confidence))


def median_bound(values: Sequence[float], confidence: float) -> float:
    """A number that the median of what independent ``values`` are drawn from does not exceed at ``confidence``: the
    first of them, in order, that so many lie below by chance. It asks nothing of how they are spread (the sign test);
    infinite where they are too few."""
    ordered, count = sorted(values), len(values)
    held = (ordered[below] for below in range(count) if _binomial(below, count, 0.5) >= confidence)
    return next(held, math.inf)


def _root(falling: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return high


def _binomial(errors: int, count: int, rate: float) -> float:
    """The probability of at most ``errors`` in ``count``."""
    if rate <= 0 or rate >= 1:
        return float(rate <= 0)
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(rate) + (count - k) * math.log1p(-rate)
        for k in range(errors + 1)
    ]  # fmt: skip
    return math.fsum(map(math.exp, logs))


def _student(confidence: float, freedom: int) -> float:
    """The quantile of Student's t, by its expansion around the normal one (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
