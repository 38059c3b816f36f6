"""Checks of the parts that a privacy claim rests on: noise, clipping, sampling, files. numpy only.

Each takes what was measured, returns the p-value or ratio that it judged by, and raises ComponentFault. A
statistical check raises for a correct part with probability at most ``level``.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, kstest, norm

from per_instance_accountant.errors import UsageError

LEVEL: Final = 1e-6
"""Probability with which a statistical check accuses a correct part, by default."""

Floats = NDArray[np.float64]


class ComponentFault(AssertionError):
    """A part does not do what the accounting assumes."""


def draws_for(deficit: float, *, level: float = LEVEL, power: float = 0.999) -> int:
    """Draws after which :func:`check_noise` finds noise whose std is too small by this share.

    Normal approximation of the chi-square law of the sum of squares.

    >>> draws_for(0.01)
    305862
    """
    if not 0 < deficit < 1:
        raise _refused("deficit", deficit, "(0, 1)")
    shrunk = (1 - deficit) ** 2
    width = (1 - shrunk) / (norm.isf(level) + shrunk * norm.isf(1 - power))
    return math.ceil(2 / width**2)


def check_noise(draws: ArrayLike, claimed_std: float, *, level: float = LEVEL) -> float:
    """The draws are Gaussian, centred, with a std of at least ``claimed_std``; returns the p-value.

    draws: any shape, what was added to the sum. One-sided in the std: more noise than claimed is no
    fault. Kolmogorov and Smirnov's test for the shape. Failing: every epsilon of the run is too small.

    >>> round(check_noise(np.random.default_rng(0).normal(0, 2.0, 1000), 2.0), 3)
    0.12
    """
    noise = np.asarray(draws, dtype=np.float64).ravel()
    if noise.size < 2 or not 0 < claimed_std < math.inf:
        raise _refused("claimed_std", claimed_std, "(0, inf) and at least two draws")
    if not np.isfinite(noise).all():
        raise ComponentFault(f"{int((~np.isfinite(noise)).sum())} of {noise.size} draws are not finite")
    small = float(chi2.cdf(float(noise @ noise) / claimed_std**2, noise.size))
    if small < level / 3:
        share = math.sqrt(float(noise @ noise) / noise.size) / claimed_std
        raise ComponentFault(f"the std is {share:.4f} of the one claimed (p = {small:.2g})")
    centre = float(2 * norm.sf(abs(noise.mean()) / noise.std() * math.sqrt(noise.size)))
    if centre < level / 3:
        raise ComponentFault(f"the mean is not 0 (p = {centre:.2g})")
    # Scaled to its own std, so that more noise than claimed passes; this makes the test more lenient only.
    shape = float(kstest(noise / float(noise.std()), "norm").pvalue)
    if shape < level / 3:
        raise ComponentFault(f"the draws are not Gaussian (p = {shape:.2g})")
    return float(min(small, centre, shape))


def check_noise_is_fresh(draws: ArrayLike, *, level: float = LEVEL) -> float:
    """No two of the noise vectors (k, n) have anything in common; returns the smallest p-value of a pair.

    One row for each step, session, rank, or parameter of one size. Failing: noise was drawn twice, after a
    resume, on two ranks or for two layers, and the difference of two releases reveals gradients.

    >>> rows = np.random.default_rng(0).normal(size=(3, 1000))
    >>> check_noise_is_fresh(rows) > 0.01
    True
    """
    rows = np.asarray(draws, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] < 100:
        raise _refused("draws", f"of shape {rows.shape}", "two rows or more of at least 100 draws")
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    # sqrt(n) times the correlation of independent Gaussian rows has lighter tails than a normal.
    worst = float(np.abs(pairs).max())
    p = min(1.0, 2 * float(norm.sf(worst * math.sqrt(rows.shape[1]))) * pairs.size)
    if not p >= level:
        raise ComponentFault(f"two noise vectors have correlation {worst:.3f} (p = {p:.2g})")
    return float(p)


def check_clipping(contributions: ArrayLike, thresholds: ArrayLike, *, relative: float = 1e-6) -> float:
    """No contribution (n, d) has a float64 norm above its threshold; returns the largest share.

    thresholds: a number or (n,). Failing: one instance moves the sum further than the noise covers.

    >>> check_clipping([[0.6, 0.8], [0.0, 0.5]], 1.0)
    1.0
    """
    rows = np.asarray(contributions, dtype=np.float64)
    norms = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)
    limits = np.broadcast_to(np.asarray(thresholds, dtype=np.float64), norms.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(norms == 0, 0.0, norms / limits)
    over = ~(shares <= 1 + relative)
    if over.any():
        worst = float(np.max(np.nan_to_num(shares, nan=np.inf)))
        raise ComponentFault(f"{int(over.sum())} of {len(norms)} norms exceed, the worst by {worst - 1:.2g}")
    return float(shares.max(initial=0.0))


def check_norms_agree(measured: ArrayLike, exact: ArrayLike, *, relative: float = 1e-4) -> float:
    """Norms found without per-sample gradients (n,) are those of the gradients; returns the largest error.

    Failing: ghost clipping scales by another norm than the gradient has, so clipping does not bound it.

    >>> check_norms_agree([1.00001, 2.0], [1.0, 2.0]) < 1e-4
    True
    """
    found, truth = np.asarray(measured, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if found.shape != truth.shape or found.size == 0:
        raise ComponentFault(f"{found.size} norms were measured for {truth.size} gradients")
    errors = np.abs(found - truth) / np.maximum(truth, np.finfo(np.float64).tiny)
    worst = float(errors.max()) if bool(np.isfinite(errors).all()) else math.inf
    if not worst <= relative:
        raise ComponentFault(f"a norm is off by {worst:.2g} of its size")
    return worst


def check_neighbours_release_alike(scales: Callable[[int], Mapping[str, float]], size: int) -> None:
    """Every number that scales a release is the same with and without one instance.

    scales: number of instances -> name and value of what multiplies a release or is published, such as
    denominators, noise std, sample rate, clip norm. Failing: whether somebody is in the data shows in
    every update, without any noise (Opacus issues 571 and 819).

    >>> check_neighbours_release_alike(lambda size: {"denominator": 8.0}, 100)
    """
    for other in (size - 1, size + 1):
        here, there = dict(scales(size)), dict(scales(other))
        # NaN equals nothing, so that a scale that is not a number is a fault as well.
        names = [n for n in sorted(here.keys() | there.keys()) if here.get(n) != there.get(n)]
        if names:
            name = names[0]
            raise ComponentFault(
                f"{name} is {here.get(name)} for {size} instances and {there.get(name)} for {other}"
            )


def check_ranks_draw_apart(masks: ArrayLike, *, level: float = LEVEL) -> float:
    """What ranks draw (ranks, draws), true or false, is independent; returns the smallest p-value of a pair.

    Rows: which of its own instances each rank drew, over all steps. Failing: ranks were seeded alike, so
    instances enter together and their sampling amplifies nothing.

    >>> draws = np.random.default_rng(0).random((3, 4000)) < 0.1
    >>> check_ranks_draw_apart(draws) > 0.001
    True
    """
    rows = np.asarray(masks, dtype=np.float64)
    centred = rows - rows.mean(axis=1, keepdims=True) if rows.ndim == 2 else rows
    if rows.ndim != 2 or not (centred != 0).any(axis=1).all():
        raise _refused("masks", f"of shape {rows.shape}", "(ranks, draws) with drawn and undrawn instances")
    return check_noise_is_fresh(centred, level=level)


class _Payload:
    """Its unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def check_loading_runs_no_code(load: Callable[[Path], object]) -> None:
    """Loading a crafted file runs nothing of it; errors while loading are as they should be.

    Failing: a checkpoint from elsewhere takes over the machine, as with ``pickle.load`` or ``torch.load``
    with ``weights_only=False``.

    >>> check_loading_runs_no_code(lambda path: path.read_bytes())
    """
    with tempfile.TemporaryDirectory(prefix="pia-crafted-") as folder:
        marker, crafted = Path(folder) / "ran", Path(folder) / "checkpoint.pt"
        crafted.write_bytes(pickle.dumps(_Payload(marker)))
        try:
            load(crafted)
        except Exception as error:
            refusal: Exception | None = error
        else:
            refusal = None
        if marker.exists():
            how = "" if refusal is None else f", before it raised {type(refusal).__name__}"
            raise ComponentFault(f"code of the file was run{how}")


def _refused(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(
        "PIA070",
        f"{name} is {value!r}, allowed is {allowed}",
        "Nothing was checked",
        "check_noise(noise_of(optimizer, 300_000), noise_multiplier * max_grad_norm)",
    )
