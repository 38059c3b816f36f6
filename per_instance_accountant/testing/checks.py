"""Laws of privacy accounting, each asked of an accountant at inputs that Hypothesis chooses and shrinks.

A call ``check_...(accountant)`` raises LawBroken with the smallest input found. "Everyday" inputs are
those of ordinary training and must be answered; "extreme" ones may be refused by an error, but no answer may
be wrong, and none may take for ever.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final

from hypothesis import strategies as st

from per_instance_accountant.testing import oracles
from per_instance_accountant.testing import strategies as make
from per_instance_accountant.testing.accountants import Accountant
from per_instance_accountant.testing.laws import asked, law, number, require

New = Callable[[], Any]

_EQUAL: Final = 1e-9
"""Relative room for rounding where a law compares two answers of one accountant."""
_EVERYDAY: Final[dict[str, Any]] = {
    "noise_multiplier": make.noise_multipliers(),
    "sample_rate": make.sample_rates(),
    "steps": make.numbers_of_steps(),
    "delta": make.deltas(),
}
_EXTREME: Final[dict[str, Any]] = {
    "noise_multiplier": make.noise_multipliers(extreme=True),
    "sample_rate": make.sample_rates(extreme=True),
}
_ONE: Final = ("add_or_remove",)


def _after(new: New, noise_multiplier: float, sample_rate: float, steps: int = 1) -> Any:
    accountant = new()
    accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    return accountant


def _sensitivity(accountant: Accountant) -> int:
    """Clip norms between two neighbours' sums: replacing an instance moves it twice as far."""
    return 2 if getattr(accountant, "relation", "add_or_remove") == "replace_one" else 1


# ------------------------------------------------------------------------------------ what epsilon is


@law(**_EVERYDAY)
def check_epsilon_is_a_number(new: New, delta: float, **step: Any) -> None:
    """For ordinary training epsilon is a finite number of at least 0.

    Failing: there is no statement, or a meaningless one, for a run that people really do.
    """
    value = number(_after(new, **step).epsilon(delta), "epsilon")
    require(math.isfinite(value), "epsilon is infinite")


@law(
    **_EXTREME,
    steps=make.numbers_of_steps(extreme=True),
    delta=make.deltas(extreme=True),
    known=(
        {"noise_multiplier": 1e-3, "sample_rate": 0.5, "steps": 10**9, "delta": 1e-300},
        {"noise_multiplier": 1e6, "sample_rate": 0.5, "steps": 1, "delta": 1e-5},
    ),
)
def check_extreme_epsilon_is_never_wrong(new: New, delta: float, **step: Any) -> None:
    """At any valid input epsilon is in [0, inf], not NaN, within the time limit; a refusal is allowed.

    Failing: NaN or a negative number passes comparisons that a budget check makes, and a call without an
    end stops a training job.
    """
    number(asked(lambda: _after(new, **step).epsilon(delta)), "epsilon")


@law(delta=make.deltas(), examples=10)
def check_no_steps_cost_nothing(new: New, delta: float) -> None:
    """Before any step epsilon is 0 (or refused).

    Failing: the sum does not start at nothing.
    """
    value = number(asked(lambda: new().epsilon(delta)), "epsilon")
    require(value == 0, f"epsilon is {value!r} before any step")


@law(**_EVERYDAY, examples=30)
def check_reading_changes_nothing(new: New, delta: float, **step: Any) -> None:
    """Asking twice gives the same answer, as does asking in between.

    Failing: a report changes the record (Opacus issue 535: reading epsilon removed the history).
    """
    read, unread = _after(new, **step), _after(new, **step)
    first = read.epsilon(delta)
    require(read.epsilon(delta) == first, "epsilon changes when it is asked for twice")
    read.step(**step), unread.step(**step)
    require(read.epsilon(delta) == unread.epsilon(delta), "reading epsilon changed what is counted later")


# ------------------------------------------------------------------------------------ never below the truth


@law(
    noise_multiplier=make.noise_multipliers(),
    steps=st.integers(1, 2000),
    delta=make.deltas(),
    known=({"noise_multiplier": 12.0, "steps": 1075, "delta": 1e-9},),
)
def check_full_batch_is_not_below_the_exact_gaussian(
    new: New, noise_multiplier: float, steps: int, delta: float
) -> None:
    """Without sampling epsilon is at least the exact one of a Gaussian with ``mu = sqrt(steps) / noise``.

    Source: Balle and Wang 2018, Theorem 8; a replaced instance counts twice. No tolerance beyond 1e-9.
    Failing: the claim is below what an attacker provably achieves.
    """
    accountant = _after(new, noise_multiplier, 1.0, steps)
    value = number(accountant.epsilon(delta), "epsilon")
    mu = _sensitivity(accountant) * math.sqrt(steps) / noise_multiplier
    _not_below(value, oracles.gaussian_epsilon(mu, delta))


@law(
    noise_multiplier=make.noise_multipliers(),
    sample_rate=make.sample_rates(),
    delta=make.deltas(),
    relations=_ONE,
    examples=40,
)
def check_one_step_is_not_below_the_exact_step(new: New, delta: float, **step: Any) -> None:
    """After one sampled step epsilon is at least the exact one, in both directions.

    Source: the test between both laws has one threshold, so its errors have a closed form (our
    derivation). Failing: the claim is below what an attacker provably achieves.
    """
    value = number(_after(new, **step).epsilon(delta), "epsilon")
    _not_below(value, oracles.step_epsilon(step["sample_rate"], 1 / step["noise_multiplier"], delta))


@law(
    noise_multiplier=make.noise_multipliers(),
    sample_rate=make.sample_rates(),
    steps=st.integers(2, 2000),
    delta=make.deltas(),
    relations=_ONE,
    examples=12,
    known=({"noise_multiplier": 0.6, "sample_rate": 0.01, "steps": 200, "delta": 1e-8},),
)
def check_a_run_is_not_below_a_lower_bound(new: New, delta: float, **step: Any) -> None:
    """After many sampled steps epsilon is at least a lower bound of the exact one.

    Source: outputs put into cells can only hide something, ``oracles.run_epsilon_below``. Failing: the
    claim is below what an attacker provably achieves (central limit theorems fail here).
    """
    value = number(_after(new, **step).epsilon(delta), "epsilon")
    ratio = 1 / step["noise_multiplier"]
    _not_below(value, oracles.run_epsilon_below(step["sample_rate"], ratio, step["steps"], delta))


def _not_below(value: float, truth: float) -> None:
    require(value >= truth * (1 - _EQUAL), f"epsilon is {value!r}, the exact one at least {truth!r}")


@law(
    noise_multiplier=make.noise_multipliers(),
    sample_rate=make.sample_rates() | st.just(1.0),
    steps=st.integers(1, 2000),
    delta=make.deltas(),
    orders=make.order_grids(),
    needs=("epsilon_over",),
    known=(
        {
            "noise_multiplier": 9.4,
            "sample_rate": 0.32768,
            "steps": 2000,
            "delta": 1e-5,
            "orders": tuple(1 + x / 10 for x in range(1, 991)),
        },
    ),
)
def check_any_orders_are_sound(new: New, orders: tuple[float, ...], delta: float, **step: Any) -> None:
    """Epsilon from any grid of Renyi orders is at least the exact one of a single step of the run.

    Failing: whoever asks for finer orders gets a smaller, wrong epsilon (Opacus issue 585).
    """
    value = number(_after(new, **step).epsilon_over(orders, delta), "epsilon")
    truth = oracles.step_epsilon(step["sample_rate"], 1 / step["noise_multiplier"], delta)
    require(value >= truth * (1 - _EQUAL), f"epsilon is {value!r}, that of one step alone {truth!r}")


# ------------------------------------------------------------------------------------ Renyi divergences


@law(
    **_EXTREME,
    order=make.orders(extreme=True),
    needs=("rdp",),
    examples=150,
    known=({"noise_multiplier": 0.5, "sample_rate": 0.01, "order": 1030.0},),
)
def check_rdp_is_a_number(new: New, order: float, **step: Any) -> None:
    """The Renyi divergence of one step is in [0, inf], not NaN, and finite where the one without sampling
    is below 1e300.

    Failing: cancellation or overflow in the formula; NaN and negative values become a small epsilon.
    """
    value = number(_rdp(_after(new, **step), order), "rdp")
    unsampled = order / (2 * step["noise_multiplier"] ** 2)
    require(math.isfinite(value) or unsampled > 1e300, f"rdp is infinite, without sampling {unsampled!r}")


@law(
    **_EXTREME,
    order=make.orders(extreme=True),
    needs=("rdp",),
    relations=_ONE,
    examples=100,
    known=(
        {"noise_multiplier": 1.0, "sample_rate": 0.01, "order": 2.0},
        {"noise_multiplier": 20.0, "sample_rate": 0.5, "order": 100.5},
    ),
)
def check_rdp_is_not_below_the_exact_value(new: New, order: float, **step: Any) -> None:
    """The Renyi divergence of one step is at least the exact value, to 1e-9.

    Source: Mironov, Talwar and Zhang 2019, in 40 digits. Failing: every epsilon from this order is unsound.
    """
    value, truth = _rdp_and_truth(new, order, step)
    require(value >= truth * (1 - _EQUAL), f"rdp is {value!r}, the exact value {truth!r}")


@law(
    **_EXTREME,
    order=make.orders(extreme=True),
    needs=("rdp",),
    relations=_ONE,
    examples=100,
    known=({"noise_multiplier": 100.0, "sample_rate": 0.3, "order": 1.1},),
)
def check_rdp_is_close_to_the_exact_value(new: New, order: float, **step: Any) -> None:
    """The Renyi divergence of one step is at most 1.0001 times the exact value.

    Failing: nothing unsound, but noise or training steps are wasted.
    """
    value, truth = _rdp_and_truth(new, order, step)
    require(value <= max(truth * 1.0001, 5e-308), f"rdp is {value!r}, the exact value {truth!r}")


def _rdp(accountant: Any, order: float) -> Any:
    return asked(lambda: accountant.rdp([order])[0])


def _rdp_and_truth(new: New, order: float, step: dict[str, Any]) -> tuple[float, float]:
    value = number(_rdp(_after(new, **step), order), "rdp")
    truth = oracles.sampled_gaussian_rdp(step["sample_rate"], 1 / step["noise_multiplier"], order)
    return value, truth


@law(
    **_EXTREME,
    orders=st.tuples(make.orders(extreme=True), make.orders(extreme=True)),
    needs=("rdp",),
    examples=100,
    known=({"noise_multiplier": 0.5, "sample_rate": 0.016, "orders": (1.1, 2.0)},),
)
def check_rdp_rises_with_the_order(new: New, orders: tuple[float, float], **step: Any) -> None:
    """Renyi divergences do not fall as the order grows.

    Source: van Erven and Harremoes 2014, Theorem 3. Failing: some of the values are wrong.
    """
    low, high = (number(_rdp(_after(new, **step), order), "rdp") for order in sorted(orders))
    require(low <= high * (1 + _EQUAL), f"rdp falls from {low!r} to {high!r}")


@law(**_EXTREME, order=make.orders(extreme=True), needs=("rdp",), relations=_ONE, examples=100)
def check_sampling_never_costs(new: New, order: float, **step: Any) -> None:
    """The Renyi divergence with sampling is at most the one without, ``order / (2 noise^2)``.

    Source: joint convexity. Failing: the value is far too large, or the formula is another one.
    """
    value = number(_rdp(_after(new, **step), order), "rdp")
    unsampled = order / (2 * step["noise_multiplier"] ** 2)
    require(value <= unsampled * (1 + _EQUAL), f"rdp is {value!r}, without sampling {unsampled!r}")


# ------------------------------------------------------------------------------------ monotone and additive


def _no_smaller(new: New, delta: float, less: dict[str, Any], more: dict[str, Any], what: str) -> None:
    low = number(_after(new, **less).epsilon(delta), "epsilon")
    high = number(_after(new, **more).epsilon(delta), "epsilon")
    # Numerical accountants answer to within an error that they state, 0.02 in all that we know.
    require(low <= high * (1 + 1e-6) + 0.02, f"{what}: {low!r}, then {high!r}")


@law(**_EVERYDAY, factor=st.integers(11, 30).map(lambda n: n / 10), examples=30)
def check_more_noise_never_costs_more(new: New, delta: float, factor: float, **step: Any) -> None:
    """Epsilon does not grow with the noise. Failing: a calibration by bisection ends anywhere."""
    noisier = step | {"noise_multiplier": step["noise_multiplier"] * factor}
    _no_smaller(new, delta, noisier, step, "epsilon grows with the noise")


@law(**_EVERYDAY, more=st.integers(1, 5000), examples=30)
def check_more_steps_never_cost_less(new: New, delta: float, more: int, **step: Any) -> None:
    """Epsilon does not fall with further steps. Failing: training on repairs a spent budget."""
    longer = step | {"steps": step["steps"] + more}
    _no_smaller(new, delta, step, longer, "epsilon falls with further steps")


@law(**_EVERYDAY, factor=st.integers(11, 30).map(lambda n: n / 10), examples=30)
def check_a_higher_rate_never_costs_less(new: New, delta: float, factor: float, **step: Any) -> None:
    """Epsilon does not fall with the sample rate. Failing: larger batches look more private."""
    denser = step | {"sample_rate": min(step["sample_rate"] * factor, 1.0)}
    _no_smaller(new, delta, step, denser, "epsilon falls with the sample rate")


@law(**_EVERYDAY, factor=st.sampled_from([1.5, 10.0, 1000.0]), examples=30)
def check_a_larger_delta_never_costs_more(new: New, delta: float, factor: float, **step: Any) -> None:
    """Epsilon does not grow with delta. Failing: two statements about one run contradict each other."""
    accountant = _after(new, **step)
    strict, loose = (number(accountant.epsilon(d), "epsilon") for d in (delta, min(delta * factor, 0.1)))
    require(loose <= strict * (1 + 1e-6) + 0.02, f"epsilon grows with delta: {strict!r}, then {loose!r}")


@law(
    noise_multiplier=make.noise_multipliers(),
    sample_rate=make.sample_rates(),
    parts=st.lists(st.integers(1, 500), min_size=2, max_size=4).map(tuple),
    delta=make.deltas(),
    examples=20,
)
def check_steps_add_up(new: New, parts: tuple[int, ...], delta: float, **step: Any) -> None:
    """Counting equal steps in parts, one of them step by step, gives the epsilon of counting them at once.

    Failing: the answer depends on how the training loop is written.
    """
    together, apart = _after(new, **step, steps=sum(parts)), new()
    for _ in range(parts[0]):
        apart.step(**step)
    for steps in parts[1:]:
        apart.step(**step, steps=steps)
    _equal(together.epsilon(delta), apart.epsilon(delta), "in parts")


@law(schedule=make.schedules(), delta=make.deltas(), examples=20)
def check_the_order_of_steps_is_irrelevant(new: New, schedule: make.Schedule, delta: float) -> None:
    """A run counted backwards has the same epsilon; accountants of equal steps only may refuse.

    Failing: the sum over mechanisms is no sum.
    """
    forwards, backwards = new(), new()
    for accountant, entries in ((forwards, schedule), (backwards, schedule[::-1])):
        for noise, rate, steps in entries:
            asked(functools.partial(accountant.step, noise_multiplier=noise, sample_rate=rate, steps=steps))
    _equal(forwards.epsilon(delta), backwards.epsilon(delta), "backwards")


def _equal(one: float, other: float, how: str) -> None:
    room = 1e-6 * abs(one) + 0.02 * (abs(one) > 0)
    require(abs(one - other) <= room, f"epsilon is {one!r}, {how} {other!r}")
