"""Hypothesis strategies for what privacy accounting is asked about. Values shrink to plain decimals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

from per_instance_accountant.accounting import PrivacyFilter
from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Resume, Run, Step, Thresholds

Schedule = tuple[tuple[float, float, int], ...]
"""Entries (noise_multiplier, sample_rate, steps)."""


def decimals(lowest: int, highest: int) -> SearchStrategy[float]:
    """Numbers of two digits from ``1e<lowest>`` to ``9.9e<highest>``, about log-uniform.

    >>> from hypothesis import find
    >>> find(decimals(-3, 0), lambda x: True)
    1.0
    """
    return st.builds(
        lambda exponent, digits: float(f"{digits / 10}e{exponent}"),
        st.integers(lowest, highest),
        st.integers(10, 99),
    )


def orders(*, extreme: bool = False) -> SearchStrategy[float]:
    """Renyi orders: tenths and whole numbers from 1.1 to 64; extreme: from 1 + 1e-6 to 10,000."""
    usual = st.integers(11, 640).map(lambda n: n / 10) | st.integers(2, 64).map(float)
    if not extreme:
        return usual
    near_one = decimals(-6, -1).map(lambda x: 1 + x)
    large = st.integers(64, 10000).map(float) | st.integers(640, 99999).map(lambda n: n / 10)
    return usual | near_one | large


def order_grids() -> SearchStrategy[tuple[float, ...]]:
    """Grids of orders that people use: every tenth up to some order, whole numbers, one order."""
    tenths = st.sampled_from([5, 11, 50, 100]).map(
        lambda top: tuple(1 + x / 10 for x in range(1, 10 * top - 9))
    )
    whole = st.sampled_from([8, 64, 256]).map(lambda top: tuple(float(x) for x in range(2, top + 1)))
    return whole | tenths | orders().map(lambda order: (order,))


def noise_multipliers(*, extreme: bool = False) -> SearchStrategy[float]:
    """Noise std over clip norm: 0.5 to 10; extreme: 1e-3 to 1e6."""
    usual = st.integers(5, 100).map(lambda n: n / 10)
    return usual | decimals(-3, 5) if extreme else usual


def sample_rates(*, extreme: bool = False) -> SearchStrategy[float]:
    """1e-5 to 0.3; extreme: 1e-12 to 1 - 1e-12."""
    usual = decimals(-5, -2) | st.integers(10, 30).map(lambda n: n / 100)
    if not extreme:
        return usual
    return usual | decimals(-12, -1) | decimals(-12, -1).map(lambda x: 1 - x)


def deltas(*, extreme: bool = False) -> SearchStrategy[float]:
    """1e-9 to 1e-3; extreme: 1e-300 to 1 - 1e-9."""
    usual = decimals(-9, -4)
    edges = st.sampled_from([1e-300, 1e-100, 1e-30, 1e-15, 0.1, 0.5, 0.9, 1 - 1e-9])
    return usual | edges if extreme else usual


def numbers_of_steps(*, extreme: bool = False) -> SearchStrategy[int]:
    """1 to 5,000; extreme: up to 1e9."""
    usual = st.integers(1, 5000)
    return usual | st.sampled_from([10**5, 10**6, 10**9]) if extreme else usual


def not_numbers() -> SearchStrategy[float]:
    """NaN and both infinities."""
    return st.sampled_from([float("nan"), float("inf"), float("-inf")])


def mechanisms(*, extreme: bool = False) -> SearchStrategy[dict[str, float]]:
    """Arguments of one step: noise_multiplier and sample_rate."""
    return st.fixed_dictionaries(
        {
            "noise_multiplier": noise_multipliers(extreme=extreme),
            "sample_rate": sample_rates(extreme=extreme),
        }
    )


def schedules(*, longest: int = 4) -> SearchStrategy[Schedule]:
    """Runs whose noise, rate and number of steps change up to ``longest - 1`` times."""
    entry = st.tuples(noise_multipliers(), sample_rates(), st.integers(1, 300))
    return st.lists(entry, min_size=1, max_size=longest).map(tuple)


@st.composite
def norm_histories(
    draw: Any, *, instances: int = 5, steps: int = 6, largest: float = 2.0
) -> NDArray[np.float64]:
    """Bounds of every instance at every step: (T, N) multiples of 1/64 up to ``largest``, some of them 0,
    with T at most ``steps`` and N at most ``instances``."""
    shape = draw(st.integers(1, steps)), draw(st.integers(1, instances))
    top = int(64 * largest)
    cells = draw(st.lists(st.integers(0, top), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(cells, dtype=np.float64).reshape(shape) / 64


@st.composite
def filters(draw: Any) -> PrivacyFilter:
    """Renyi and Gaussian filters with one budget."""
    budget = draw(st.integers(1, 80)) / 10
    if draw(st.booleans()):
        return PrivacyFilter(budget=budget, delta=draw(deltas()))
    if draw(st.booleans()):
        return PrivacyFilter(budget=budget, order=draw(orders()))
    return PrivacyFilter(budget=budget, family="gaussian")


@st.composite
def events(draw: Any, instances: int, *, most: int = 12) -> list[Phase | Thresholds | Step | Resume]:
    """A course of events that a ledger of this size accepts: phases, thresholds, steps, resumes."""
    charging = draw(st.sampled_from(["worst_case", "sweep", "unamplified", "last_seen"]))
    course: list[Phase | Thresholds | Step | Resume] = [draw(_phases(charging))]
    if charging == "sweep":
        course.append(draw(_thresholds(instances)))
    steps = 0
    for _ in range(draw(st.integers(0, most))):
        kind = draw(st.sampled_from(["step", "step", "step", "phase", "thresholds", "resume"]))
        if kind == "step":
            step, limits = draw(_steps(instances, 0.5)), [e for e in course if isinstance(e, Thresholds)]
            # A run that did not clip at its thresholds has no individual numbers.
            kept = limits[-1].values[step.positions] if limits else step.contributions
            course.append(replace(step, contributions=np.minimum(step.contributions, kept)))
            steps += 1
        elif kind == "phase":
            course.append(draw(_phases(charging)))
        elif kind == "thresholds" and charging == "sweep":
            course.append(draw(_thresholds(instances)))
        elif kind == "resume":
            course.append(Resume(at_step=draw(st.integers(0, steps))))
            # What was stated after the checkpoint no longer binds, so it is stated again.
            course.append(draw(_phases(charging)))
            course += [draw(_thresholds(instances))] if charging == "sweep" else []
    return course


@st.composite
def _phases(draw: Any, charging: str) -> Phase:
    return Phase(
        kind="train",
        sampling="shuffled" if charging == "unamplified" else "poisson",
        sample_rate=draw(sample_rates()),
        noise_std=draw(noise_multipliers()),
        max_grad_norm=1.0,
        charging=charging,
        denominator=1.0,
        learning_rate=0.1,
    )


@st.composite
def _thresholds(draw: Any, instances: int) -> Thresholds:
    values = draw(st.lists(st.integers(0, 64), min_size=instances, max_size=instances))
    return Thresholds(values=np.array(values, dtype=np.float32) / np.float32(64), source="sweep")


@st.composite
def _steps(draw: Any, instances: int, largest: float) -> Step:
    drawn = draw(st.lists(st.integers(0, instances - 1), unique=True, max_size=instances))
    sizes = draw(st.lists(st.integers(0, 64), min_size=len(drawn), max_size=len(drawn)))
    contributions = np.array(sizes, dtype=np.float32) * np.float32(largest / 64)
    return Step(positions=np.array(drawn, dtype=np.int64), contributions=contributions)


@st.composite
def ledgers(draw: Any, *, instances: int = 4) -> Ledger:
    """Ledgers in memory of up to ``instances`` instances, with every kind of course of :func:`events`."""
    size = draw(st.integers(1, instances))
    writer = LedgerWriter.create(None, Run(num_instances=size))
    for event in draw(events(size)):
        writer.append(event)
    return writer.ledger()


@st.composite
def unlearning_problems(draw: Any) -> dict[str, float]:
    """Full-batch noisy gradient descent on ridge regression: arguments of ``oracles.ridge_divergence``."""
    return {
        "instances": draw(st.integers(3, 12)),
        "dimension": draw(st.integers(1, 3)),
        "regularisation": draw(st.integers(1, 20)) / 10,
        "noise_std": draw(st.integers(5, 40)) / 10,
        "learning_rate": draw(st.integers(1, 9)) / 10,
        "training_steps": draw(st.integers(1, 15)),
        "unlearning_steps": draw(st.integers(0, 15)),
        "order": draw(st.sampled_from([2.0, 4.0, 16.0])),
        "seed": draw(st.integers(0, 1000)),
    }
