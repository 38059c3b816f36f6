"""Accountants with one mistake each. Every law has one here that only a working law notices."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import numpy as np

from per_instance_accountant.divergence import DEFAULT_ORDERS, rdp_to_epsilon
from per_instance_accountant.testing.accountants import LedgerAccountant, RenyiAccountant


class Nan(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        return math.nan if self.num_steps() > 1500 else super().epsilon(delta)


class NegativeAtExtremes(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        return super().epsilon(delta) - 1e-3 * (delta > 0.3)


class CostsBeforeTheFirstStep(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        return super().epsilon(delta) + 0.1


class ReadingForgets(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        value = super().epsilon(delta)
        self._entries[:-1] = []
        if self._entries:
            noise, rate, steps = self._entries[-1]
            self._entries[-1] = (noise, rate, steps - 1)
        return value


class MoreNoiseThanWasAdded(RenyiAccountant):
    """By 1.4: the conversion of Renyi divergences has some slack."""

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        super().step(noise_multiplier=noise_multiplier * 1.4, sample_rate=sample_rate, steps=steps)


class SquareRootOfSteps(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        fewer = math.ceil(math.sqrt(steps))
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=fewer)


class SmallOrdersAreFree(RenyiAccountant):
    def epsilon_over(self, orders: Any, delta: float) -> float:
        if np.min(orders) < 1.2:
            return 0.0
        return super().epsilon_over(orders, delta)


class OverflowsAtLargeOrders(RenyiAccountant):
    def rdp(self, orders: Any) -> Any:
        return np.where(np.asarray(orders) > 1000, np.nan, super().rdp(orders))


class SlightlyTooSmall(RenyiAccountant):
    def rdp(self, orders: Any) -> Any:
        return super().rdp(orders) * (1 - 1e-8)


class SlightlyTooLarge(RenyiAccountant):
    def rdp(self, orders: Any) -> Any:
        return super().rdp(orders) * 1.001


class DipsAtOneOrder(RenyiAccountant):
    def rdp(self, orders: Any) -> Any:
        grid = np.asarray(orders)
        return super().rdp(orders) * np.where((grid > 30) & (grid < 64), 0.01, 1.0)


class IgnoresSampling(RenyiAccountant):
    def rdp(self, orders: Any) -> Any:
        plain = sum(n / (2 * s * s) for s, _, n in self._entries)
        return np.asarray(orders) * plain * 1.01


class NoiseCosts(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        return super().epsilon(delta) + max((s for s, _, _ in self._entries), default=0.0)


class StepsHeal(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        return super().epsilon(delta) + 1000 / (1 + self.num_steps())


class RateHeals(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        return super().epsilon(delta) + 100 * max((1 - q for _, q, _ in self._entries), default=0.0)


class DeltaCosts(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        return super().epsilon(delta) * (1 + 10 * delta) + 100 * delta


class ForgetsAfterManySteps(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        counted = steps if steps == 1 or not self._entries else steps // 2
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=counted)


class LastMechanismOnly(RenyiAccountant):
    def epsilon(self, delta: float) -> float:
        kept, self._entries = self._entries, self._entries[-1:]
        value = super().epsilon(delta)
        self._entries = kept
        return value


class NanIsZero(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        if noise_multiplier == noise_multiplier:
            super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


class PopsBeforeItChecks(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        kept, self._entries = self._entries, []
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        self._entries = [*kept, *self._entries]


class ChangeOfNoiseForgets(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        if self._entries and self._entries[-1][0] < noise_multiplier:
            self._entries = []
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


class CountsChanges(RenyiAccountant):
    def num_steps(self) -> int:
        return len(self._entries)


class RestoresHalf(RenyiAccountant):
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict({"entries": [[s, q, (n + 1) // 2] for s, q, n in state["entries"]]})


class Aliases(RenyiAccountant):
    def __init__(self) -> None:
        self._entries: Any = []

    def state_dict(self) -> dict[str, Any]:
        return {"entries": self._entries}

    def load_state_dict(self, state: Any) -> None:
        self._entries = state["entries"]


class LoadsAnything(RenyiAccountant):
    def load_state_dict(self, state: Any) -> None:
        self._entries = [tuple(entry) for entry in state["entries"] or []]

    def epsilon(self, delta: float) -> float:
        known = [e for e in self._entries if e[0] == e[0]]
        total = np.zeros(len(DEFAULT_ORDERS))
        for s, q, n in known:
            single = RenyiAccountant()
            single.step(noise_multiplier=abs(float(s)), sample_rate=min(abs(float(q)), 1.0))
            total += max(int(n), 0) * single.rdp(DEFAULT_ORDERS)
        return float(rdp_to_epsilon(DEFAULT_ORDERS, total, delta))


class Overshoots(RenyiAccountant):
    def calibrate(self, target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
        """Returns the last noise that was too small."""
        noise = 1000.0
        while noise > 0.3:
            noise /= 1.1
            trial = RenyiAccountant()
            trial.step(noise_multiplier=noise, sample_rate=sample_rate, steps=steps)
            if trial.epsilon(delta) > target_epsilon:
                break
        return noise


class RoundsToNearest(LedgerAccountant):
    def individual_rdp(self, sample_rate: float, ratios: Any, orders: Any) -> Any:
        return super().individual_rdp(sample_rate, np.round(ratios * 8) / 8, orders)


class MeanOfTheBatch(LedgerAccountant):
    def individual_rdp(self, sample_rate: float, ratios: Any, orders: Any) -> Any:
        values = super().individual_rdp(sample_rate, ratios, orders)
        return np.maximum(values, values[:1])


class OneStepMore(LedgerAccountant):
    def unlearning_rdp(self, *, unlearning_steps: int, **problem: Any) -> float:
        return super().unlearning_rdp(unlearning_steps=unlearning_steps + 1, **problem)


SEEDED: dict[str, type] = {
    "epsilon_is_a_number": Nan,
    "extreme_epsilon_is_never_wrong": NegativeAtExtremes,
    "no_steps_cost_nothing": CostsBeforeTheFirstStep,
    "reading_changes_nothing": ReadingForgets,
    "full_batch_is_not_below_the_exact_gaussian": MoreNoiseThanWasAdded,
    "one_step_is_not_below_the_exact_step": MoreNoiseThanWasAdded,
    "a_run_is_not_below_a_lower_bound": SquareRootOfSteps,
    "any_orders_are_sound": SmallOrdersAreFree,
    "rdp_is_a_number": OverflowsAtLargeOrders,
    "rdp_is_not_below_the_exact_value": SlightlyTooSmall,
    "rdp_is_close_to_the_exact_value": SlightlyTooLarge,
    "rdp_rises_with_the_order": DipsAtOneOrder,
    "sampling_never_costs": IgnoresSampling,
    "more_noise_never_costs_more": NoiseCosts,
    "more_steps_never_cost_less": StepsHeal,
    "a_higher_rate_never_costs_less": RateHeals,
    "a_larger_delta_never_costs_more": DeltaCosts,
    "steps_add_up": ForgetsAfterManySteps,
    "the_order_of_steps_is_irrelevant": LastMechanismOnly,
    "impossible_input_is_refused": NanIsZero,
    "a_refused_step_changes_nothing": PopsBeforeItChecks,
    "a_change_of_noise_is_counted_or_refused": ChangeOfNoiseForgets,
    "steps_are_counted": CountsChanges,
    "a_saved_state_restores_epsilon": RestoresHalf,
    "states_are_not_shared": Aliases,
    "an_impossible_state_is_refused": LoadsAnything,
    "a_missing_history_is_refused": LoadsAnything,
    "calibrated_noise_keeps_the_target": Overshoots,
    "impossible_targets_are_refused": Overshoots,
    "individuals_are_not_below_the_plain_sum": RoundsToNearest,
    "individuals_do_not_depend_on_each_other": MeanOfTheBatch,
    "unlearning_is_not_below_the_exact_ridge": OneStepMore,
}
"""Law -> an accountant that breaks it."""


# ------------------------------------------------------------------------------------ bad manners


class LoopsOnNan(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        while noise_multiplier != noise_multiplier:
            try:
                sum(range(1000))
            except Exception:
                continue
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


class SleepsOnNan(RenyiAccountant):
    """Takes no CPU time, so only the watching process can notice it."""

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        if noise_multiplier != noise_multiplier:
            time.sleep(60)
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


class EndsTheProcess(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        print("noise on stdout that is no verdict")
        if noise_multiplier != noise_multiplier:
            os._exit(7)
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


class RefusesEverything(RenyiAccountant):
    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        raise ValueError("no")

    def epsilon(self, delta: float) -> float:
        raise ValueError("no")
