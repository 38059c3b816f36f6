"""Laws of conduct: bad input, saved state, calibration, and what concerns single instances."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from per_instance_accountant.testing import oracles
from per_instance_accountant.testing import strategies as make
from per_instance_accountant.testing.laws import REFUSALS, asked, law, number, require

New = Callable[[], Any]

_STEP: Final = {"noise_multiplier": 1.0, "sample_rate": 0.01}
_IMPOSSIBLE: Final = {
    "noise_multiplier": (math.nan, math.inf, -math.inf, -1.0),
    "sample_rate": (math.nan, math.inf, -math.inf, -0.5, 1.5),
    "delta": (math.nan, math.inf, -math.inf, -1e-5, 2.0),
    "steps": (-5,),
}
"""Argument -> values that no run can have. A noise of +inf may be answered, by 0."""


def _refuses(call: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether the call raises an error (the answer beside it)."""
    try:
        return False, call()
    except REFUSALS:
        return True, None


@law(
    which=st.sampled_from([(name, value) for name, values in _IMPOSSIBLE.items() for value in values]),
    examples=len(_IMPOSSIBLE) * 8,
    known=tuple({"which": ("noise_multiplier", value)} for value in _IMPOSSIBLE["noise_multiplier"])
    + tuple({"which": ("delta", value)} for value in _IMPOSSIBLE["delta"]),
)
def check_impossible_input_is_refused(new: New, which: tuple[str, float]) -> None:
    """NaN, infinities, negative values, rates above 1 and deltas above 1 raise an error, or give infinity.

    Failing: a mistake in a configuration becomes a number that looks like privacy; with NaN often 0.
    """
    name, value = which

    def ask() -> float:
        accountant = new()
        arguments = {**_STEP, "steps": 10, **({} if name == "delta" else {name: value})}
        accountant.step(**arguments)
        return float(accountant.epsilon(value if name == "delta" else 1e-5))

    refused, epsilon = _refuses(ask)
    harmless = which == ("noise_multiplier", math.inf) and epsilon == 0
    require(refused or epsilon == math.inf or harmless, f"answered epsilon = {epsilon!r}")


@law(
    which=st.sampled_from([(n, v) for n in ("noise_multiplier", "sample_rate") for v in (math.nan, -1.0)]),
    examples=8,
)
def check_a_refused_step_changes_nothing(new: New, which: tuple[str, float]) -> None:
    """After an error epsilon is what it was before.

    Failing: steps that were taken are forgotten by whoever catches the error.
    """
    name, value = which
    accountant, other = new(), new()
    accountant.step(**_STEP, steps=100), other.step(**_STEP, steps=100)
    before = other.epsilon(1e-5)
    refused, _ = _refuses(lambda: accountant.step(**(_STEP | {name: value})))
    if refused:
        after = asked(lambda: accountant.epsilon(1e-5))
        require(after == before, f"epsilon was {before!r} before the error and is {after!r} after it")


@law(noise_multiplier=st.sampled_from([0.7, 2.0]), examples=4)
def check_a_change_of_noise_is_counted_or_refused(new: New, noise_multiplier: float) -> None:
    """Steps with another noise are added, or refused with everything before them kept.

    Failing: what was spent before the change is forgotten.
    """
    accountant, other = new(), new()
    accountant.step(**_STEP, steps=200), other.step(**_STEP, steps=200)
    before = other.epsilon(1e-5)
    _refuses(lambda: accountant.step(noise_multiplier=noise_multiplier, sample_rate=0.01, steps=200))
    after = accountant.epsilon(1e-5)
    require(after >= before * (1 - 1e-6) - 0.02, f"epsilon fell from {before!r} to {after!r}")


@law(steps=st.integers(1, 20), repeats=st.integers(1, 3), needs=("num_steps",), examples=10)
def check_steps_are_counted(new: New, steps: int, repeats: int) -> None:
    """The number of steps is the number of steps.

    Failing: whoever compares it with the training loop is misled (Opacus counts changes of the noise).
    """
    accountant = new()
    for _ in range(repeats):
        accountant.step(**_STEP, steps=steps)
    counted = accountant.num_steps()
    require(counted == steps * repeats, f"{counted} steps after {steps * repeats}")


# ------------------------------------------------------------------------------------ saved state


def _with_state(new: New, steps: int) -> tuple[Any, Any]:
    accountant = new()
    accountant.step(**_STEP, steps=steps)
    return accountant, accountant.state_dict()


@law(steps=st.integers(1, 50), needs=("state_dict",), examples=8)
def check_a_saved_state_restores_epsilon(new: New, steps: int) -> None:
    """An accountant that loads a state continues where the other one was.

    Failing: a resumed run starts again from another total.
    """
    accountant, state = _with_state(new, steps)
    other = new()
    other.load_state_dict(copy.deepcopy(state))
    accountant.step(**_STEP), other.step(**_STEP)
    require(other.epsilon(1e-5) == accountant.epsilon(1e-5), "epsilon differs after one more step")


@law(steps=st.integers(1, 50), needs=("state_dict",), examples=8)
def check_states_are_not_shared(new: New, steps: int) -> None:
    """A saved state, the accountant it came from and those that loaded it do not change each other.

    Failing: steps of one run are counted in another, or a checkpoint in memory moves on by itself.
    """
    accountant, state = _with_state(new, steps)
    kept, before = copy.deepcopy(state), accountant.epsilon(1e-5)
    first, second = new(), new()
    first.load_state_dict(state), second.load_state_dict(state)
    first.step(**_STEP, steps=30)
    require(state == kept, "a step after loading changed the saved state")
    require(accountant.epsilon(1e-5) == before, "a step changed the accountant that the state came from")
    require(second.epsilon(1e-5) == before, "a step changed another accountant that loaded the state")


@law(
    damage=st.sampled_from(["negative", "nan", "none", "text"]),
    place=st.integers(0, 20),
    needs=("state_dict",),
    examples=40,
)
def check_an_impossible_state_is_refused(new: New, damage: str, place: int) -> None:
    """A state with a number that no run can have is refused, or epsilon is not below what it was.

    Failing: a damaged or edited checkpoint restores less privacy loss than was spent.
    """
    accountant, state = _with_state(new, 100)
    before = accountant.epsilon(1e-5)
    damaged = copy.deepcopy(state)
    spots = list(_spots(damaged))
    container, key = spots[place % len(spots)]
    value = container[key]
    container[key] = {"negative": -5 * abs(value), "nan": math.nan, "none": None, "text": "1"}[damage]

    def ask() -> float:
        other = new()
        other.load_state_dict(damaged)
        return float(other.epsilon(1e-5))

    refused, epsilon = _refuses(ask)
    require(refused or epsilon >= before * (1 - 1e-9), f"epsilon {before!r} became {epsilon!r}")


@law(needs=("state_dict",), examples=1, always=st.just("no entries"))
def check_a_missing_history_is_refused(new: New, always: str) -> None:
    """A state whose lists are replaced by None is refused.

    Failing: a checkpoint that lost its history restores a run that has spent nothing.
    """
    _, state = _with_state(new, 100)
    lost = {key: None if isinstance(value, (list, tuple)) else value for key, value in state.items()}

    def ask() -> float:
        other = new()
        other.load_state_dict(lost)
        return float(other.epsilon(1e-5))

    refused, epsilon = _refuses(ask)
    require(refused or lost == state, f"answered epsilon = {epsilon!r}")


def _spots(state: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of every number in a state; tuples become lists, so that they can be changed."""
    keys = list(state) if isinstance(state, dict) else range(len(state))
    for key in keys:
        if isinstance(state[key], tuple):
            state[key] = list(state[key])
        if isinstance(state[key], (dict, list)):
            yield from _spots(state[key])
        elif isinstance(state[key], (int, float)) and not isinstance(state[key], bool):
            yield state, key


# ------------------------------------------------------------------------------------ calibration


@law(
    target=st.integers(3, 160).map(lambda n: n / 10),
    sample_rate=make.sample_rates(),
    steps=st.integers(1, 2000),
    delta=make.deltas(),
    needs=("calibrate",),
    examples=20,
)
def check_calibrated_noise_keeps_the_target(
    new: New, target: float, delta: float, sample_rate: float, steps: int
) -> None:
    """With the noise that was calibrated for a target epsilon, epsilon is at most the target.

    Failing: the budget is exceeded by following the library's own advice.
    """
    noise = number(asked(lambda: new().calibrate(target, delta, sample_rate, steps)), "the noise")
    accountant = new()
    accountant.step(noise_multiplier=noise, sample_rate=sample_rate, steps=steps)
    reached = number(accountant.epsilon(delta), "epsilon")
    require(reached <= target * (1 + 1e-9), f"epsilon is {reached!r}")


@law(
    which=st.sampled_from(
        [("target", math.nan), ("target", -1.0), ("delta", math.nan), ("delta", 2.0), ("steps", 0)]
    ),
    needs=("calibrate",),
    examples=10,
    known=({"which": ("target", math.nan)}, {"which": ("steps", 0)}),
)
def check_impossible_targets_are_refused(new: New, which: tuple[str, float]) -> None:
    """Calibration for NaN, a negative target or an impossible delta raises an error; no steps may give 0.

    Failing: training runs with noise that fits no target, or the search does not end.
    """
    arguments = {"target": 1.0, "delta": 1e-5, "sample_rate": 0.01, "steps": 100} | {which[0]: which[1]}
    refused, noise = _refuses(
        lambda: new().calibrate(
            arguments["target"], arguments["delta"], arguments["sample_rate"], arguments["steps"]
        )
    )
    harmless = which == ("steps", 0) and noise is not None and noise >= 0
    require(refused or harmless, f"answered noise = {noise!r}")


# ------------------------------------------------------------------------------------ single instances

Floats = NDArray[np.float64]
_HISTORY: Final[dict[str, Any]] = {
    "ratios": make.norm_histories(),
    "sample_rate": st.sampled_from([0.01, 0.25, 1.0]),
}
_ORDERS: Final = np.array([1.5, 2.0, 8.0, 33.0])


@law(**_HISTORY, needs=("individual_rdp",), examples=25)
def check_individuals_are_not_below_the_plain_sum(new: New, ratios: Floats, sample_rate: float) -> None:
    """Every instance's loss is at least the sum of the exact losses of its steps, and close above it.

    Failing: norms were rounded down or to the nearest level, or steps are missing.
    """
    value = np.asarray(new().individual_rdp(sample_rate, ratios, _ORDERS))
    truth = oracles.individual_rdp(sample_rate, ratios, _ORDERS)
    require(value.shape == truth.shape, f"shape {value.shape} for {truth.shape}")
    require(bool((value >= truth * (1 - 1e-9)).all()), f"lowest share {_share(value, truth, np.min)!r}")
    require(bool((value <= truth * 1.01 + 1e-300).all()), f"largest share {_share(value, truth, np.max)!r}")


def _share(value: Floats, truth: Floats, pick: Callable[[Floats], Any]) -> float:
    return float(pick(value[truth > 0] / truth[truth > 0])) if (truth > 0).any() else math.inf


@law(**_HISTORY, seed=st.integers(0, 99), needs=("individual_rdp",), examples=25)
def check_individuals_do_not_depend_on_each_other(
    new: New, ratios: Floats, sample_rate: float, seed: int
) -> None:
    """Reordering the instances reorders their losses, to 1e-12, and nothing else changes them.

    Failing: somebody's bound depends on who else is in the data set.
    """
    order = np.random.default_rng(seed).permutation(ratios.shape[1])
    plain = np.asarray(new().individual_rdp(sample_rate, ratios, _ORDERS))
    moved = np.asarray(new().individual_rdp(sample_rate, ratios[:, order], _ORDERS))
    require(bool(np.allclose(moved, plain[order], rtol=1e-12, atol=0)), "losses changed with the order")


@law(problem=make.unlearning_problems(), needs=("unlearning_rdp",), examples=40)
def check_unlearning_is_not_below_the_exact_ridge(new: New, problem: dict[str, Any]) -> None:
    """The divergence that is claimed after unlearning steps is at least the exact one of a ridge regression.

    Source: both laws are Gaussian, ``oracles.ridge_divergence``. Failing: plans stop too early.
    """
    exact = oracles.ridge_divergence(**problem)
    value = number(
        new().unlearning_rdp(
            sensitivity=exact["sensitivity"],
            noise_std=problem["noise_std"],
            contraction=exact["contraction"],
            training_steps=problem["training_steps"],
            unlearning_steps=problem["unlearning_steps"],
            order=problem["order"],
        ),
        "the divergence",
    )
    require(value >= exact["divergence"] * (1 - 1e-9), f"{value!r} claimed, {exact['divergence']!r} exact")
