"""Steps until a deletion is certified: against the published routes, and individual against worst-case plans.

First part: the setting of the released code of Chien et al. 2024 (binary MNIST, n = 11,264), S rows
forgotten, by each route. Second part: digits (10 classes) and breast cancer (2 classes), softmax regression
with thresholds from the input norms, full batch: the steps of the individual plan over those of the
worst-case plan by decile, and test accuracy after forgetting one easy instance at the same guarantee. Third
part: what each way of training buys on the same data: steps for the easiest, median and hardest instance, and
the test accuracy that it costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.datasets import load_breast_cancer, load_digits

from benchmarks import Figure, arguments, report
from per_instance_accountant.accounting import PrivacyFilter, WorstCase
from per_instance_accountant.accounting.spending import Spending
from per_instance_accountant.divergence import gaussian_mu
from per_instance_accountant.ledger import Drop, Event, Ledger, LedgerWriter, Phase, Run, Step, Thresholds
from per_instance_accountant.unlearning import (
    Assumptions,
    bounds,
    largest_threshold,
    plan,
    plan_everyone,
    softmax_regression,
)

Array = NDArray[np.float64]

ROWS, TEMPERATURE = 11264, 0.03
CONVEXITY = 1e-6 * ROWS
STEP_SIZE = 1 / (0.25 + CONVEXITY)
DELTA = 1 / ROWS
SETTINGS = ((1, 0.05, 21, 6), (10, 0.5, 27, 12), (100, 1.0, 66, 50))
"""Rows forgotten, epsilon, and the targets for replacement and for removal."""
CLIP = math.sqrt(2) * 1.001
TARGET, TARGET_DELTA = 0.05, 1e-5


def published_setting() -> dict[str, Figure]:
    """Steps of every route at each (S, epsilon); ours must not exceed the targets."""
    figures: dict[str, Figure] = {}
    common = {
        "strong_convexity": CONVEXITY,
        "step_size": STEP_SIZE,
        "temperature_std": TEMPERATURE,
        "gradient_norm": 1.0,
        "num_instances": ROWS,
        "delta": DELTA,
    }
    routes: dict[str, Any] = {
        "langevin_published": (bounds.langevin_unlearning, "mironov"),
        "langevin_improved_conversion": (bounds.langevin_unlearning, "improved"),
        "noisy_gd_published": (bounds.noisy_sgd_unlearning, "mironov"),
        "noisy_gd_improved_conversion": (bounds.noisy_sgd_unlearning, "improved"),
    }
    for forgotten, epsilon, replacement, removal in SETTINGS:
        at = f"S{forgotten}_eps{epsilon:g}"
        for name, (route, conversion) in routes.items():
            steps = route(**common, replaced=forgotten, conversion=conversion).steps(epsilon)
            figures[f"{at}_{name}_steps"] = Figure(value=steps)
        moved = STEP_SIZE * forgotten / ROWS
        for name, shift, target in (("replacement", 2 * moved, replacement), ("removal", moved, removal)):
            bound = bounds.contractive(
                sensitivity=shift,
                noise_std=math.sqrt(2 * STEP_SIZE) * TEMPERATURE,
                contraction=1 - STEP_SIZE * CONVEXITY,
                training_steps=1_000_000,
                delta=DELTA,
            )
            figures[f"{at}_R3_{name}_steps"] = Figure(value=bound.steps(epsilon), target=target)
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Softmax regression on rows of norm at most 1, split once, with its mechanism (lr, wd, noise std)."""

    name: str
    features: Array
    labels: NDArray[np.int64]
    test_features: Array
    test_labels: NDArray[np.int64]
    learning_rate: float = 1.0
    weight_decay: float = 0.02
    noise_std: float = 10.0
    training_steps: int = 200

    @property
    def norms(self) -> Array:
        norms: Array = np.linalg.norm(self.features, axis=1)
        return norms


def problem(name: str, loader: Any) -> Problem:
    """Public scaling: centred and scaled by the constants of the whole table, clipped to norm 1, bias 0.1."""
    x, y = loader(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-9) if name == "breast_cancer" else x
    x = np.column_stack([x / (80.0 if name == "digits" else 12.0), np.full(len(x), 0.1)])[order]
    x *= np.minimum(1.0, 1 / np.linalg.norm(x, axis=1))[:, None]
    cut = int(0.8 * len(x))
    return Problem(
        name=name,
        features=x[:cut],
        labels=y[order][:cut].astype(np.int64),
        test_features=x[cut:],
        test_labels=y[order][cut:].astype(np.int64),
        noise_std=10.0 if name == "digits" else 12.0,
    )


def assumptions_of(case: Problem) -> Assumptions:
    """Softmax regression on rows of norm at most 1, full batch."""
    n = len(case.features)
    return softmax_regression(
        feature_norm=1.0, num_instances=n, denominator=float(n), individual_thresholds=True
    )


def phase_of(case: Problem) -> Phase:
    """The mechanism of the case."""
    return Phase(
        kind="train",
        sampling="poisson",
        sample_rate=1.0,
        noise_std=case.noise_std,
        max_grad_norm=float(np.float32(CLIP)),
        charging="fixed_thresholds",
        denominator=float(len(case.features)),
        learning_rate=case.learning_rate,
        weight_decay=case.weight_decay,
    )


def ledger_of(case: Problem, budget: PrivacyFilter | None = None) -> tuple[Ledger, NDArray[np.int64]]:
    """What a full-batch run with thresholds ``sqrt(2) |x_i|`` records, no gradient is needed for it; and (n,)
    how many steps each instance takes part in, under a filter with ``budget``."""
    n = len(case.features)
    values = np.minimum(case.norms * CLIP, CLIP).astype(np.float32)
    writer = LedgerWriter.create(None, Run(num_instances=n, assumptions=assumptions_of(case).to_dict()))
    phase, took_part = phase_of(case), np.full(n, case.training_steps)
    stated = None if budget is None else budget.stated(budget.per_instance(n, {}), phase)
    spending = None if stated is None else Spending(stated)

    def append(event: Event) -> None:
        writer.append(event)
        if spending is not None:
            spending.take(event)

    if stated is not None:
        writer.append(stated)
    append(Thresholds(values=values, source="fixed"))
    append(phase)
    for step in range(case.training_steps):
        leaving = np.empty(0, np.int64) if spending is None else spending.exceeding()
        if leaving.size:
            took_part[leaving] = step
            append(Drop(positions=leaving))
        append(Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32)))
    return writer.ledger(), took_part


def descend(
    case: Problem,
    kept: NDArray[np.bool_],
    theta: Array,
    steps: int,
    rng: np.random.Generator,
    took_part: NDArray[np.int64] | None = None,
) -> Array:
    """Noisy full-batch steps of the ledger's mechanism on the rows ``kept``, each for ``took_part`` steps."""
    x, n = case.features[kept], len(case.features)
    one_hot = np.eye(theta.shape[1])[case.labels[kept]]
    until = np.full(len(x), steps) if took_part is None else took_part[kept]
    for step in range(steps):
        logits = x @ theta
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        gradient = x.T @ ((p / p.sum(axis=1, keepdims=True) - one_hot) * (step < until)[:, None])
        noise = rng.normal(0.0, case.noise_std, theta.shape)
        theta = theta - case.learning_rate * ((gradient + noise) / n + case.weight_decay * theta)
    return theta


def accuracy(case: Problem, theta: Array) -> float:
    """Share of the test rows that are classified correctly."""
    return float(((case.test_features @ theta).argmax(axis=1) == case.test_labels).mean())


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), float(student.ppf(0.975, len(values) - 1)) * spread


def individual_against_worst_case(case: Problem, seeds: int) -> dict[str, Figure]:
    """Deciles of the ratio of steps, and the trade-off between noise, steps and accuracy."""
    (ledger, _), target, delta = ledger_of(case), TARGET, TARGET_DELTA
    everyone = plan_everyone(ledger, target, target_delta=delta, levels=64)
    one = ledger.ids[:1]
    worst = plan(ledger, one, target, target_delta=delta, charging=WorstCase())
    worst_steps = float(worst.steps if worst.steps is not None else math.inf)
    figures = {f"{case.name}_worst_case_steps": Figure(value=worst_steps)}
    ratios = np.sort(everyone.steps / worst_steps)
    for decile in range(10, 101, 10):
        share = ratios[math.ceil(decile / 100 * len(ratios)) - 1]
        target_ratio = 1.0 if decile == 100 else None
        figures[f"{case.name}_steps_ratio_p{decile}"] = Figure(value=float(share), target=target_ratio)
    return figures | _accuracy_at_equal_guarantee(case, everyone.steps, worst_steps, target, delta, seeds)


def _accuracy_at_equal_guarantee(
    case: Problem, individual: Array, worst_steps: float, target: float, delta: float, seeds: int
) -> dict[str, Figure]:
    """One easy instance (first decile of its steps) is forgotten with the same (epsilon, delta) three ways:
    its own number of steps; the worst case's; and its own number of steps with all noise, in training and
    after, raised until the worst-case bound holds after them too. The last isolates what individual
    accounting saves in noise."""
    easy = int(np.argsort(individual, kind="stable")[len(individual) // 10])
    own = int(individual[easy])
    n = len(case.features)
    quiet = bounds.contractive(
        sensitivity=case.learning_rate * CLIP / n,
        noise_std=case.learning_rate * case.noise_std / n,
        contraction=1 - case.learning_rate * case.weight_decay,
        training_steps=case.training_steps,
        delta=delta,
    )
    factor = quiet.mu(own) / gaussian_mu(target, delta)
    louder = replace(case, noise_std=case.noise_std * max(1.0, factor))
    kept = np.arange(n) != easy
    classes = int(case.labels.max()) + 1
    runs: dict[str, list[float]] = {"individual": [], "worst_case_steps": [], "worst_case_noise": []}
    for seed in range(seeds):
        for name, used, steps in (
            ("individual", case, own),
            ("worst_case_steps", case, int(worst_steps)),
            ("worst_case_noise", louder, own),
        ):
            rng = np.random.default_rng(seed)
            start = np.zeros((case.features.shape[1], classes))
            trained = descend(used, np.ones(n, dtype=np.bool_), start, case.training_steps, rng)
            runs[name].append(accuracy(used, descend(used, kept, trained, steps, rng)))
    figures = {f"{case.name}_easy_instance_steps": Figure(value=own, target=worst_steps)}
    figures[f"{case.name}_worst_case_noise_factor"] = Figure(value=max(1.0, factor))
    for name, values in runs.items():
        mean, half = interval(values)
        figures[f"{case.name}_accuracy_{name}"] = Figure(value=mean)
        figures[f"{case.name}_accuracy_{name}_half_width_95"] = Figure(value=half)
    gains = [a - b for a, b in zip(runs["individual"], runs["worst_case_noise"], strict=True)]
    mean, half = interval(gains)
    figures[f"{case.name}_accuracy_gain_lower_95"] = Figure(value=mean - half)
    figures[f"{case.name}_accuracy_gain_upper_95"] = Figure(value=mean + half)
    return figures


def ways_of_training(case: Problem, seeds: int) -> dict[str, Figure]:
    """Steps for the easiest, median and hardest instance, and test accuracy of the trained model, by the way
    in which it was trained:

    thresholds from input norms; rows bounded so that everybody needs at most half of the worst case's steps
    (``largest_threshold``); and a filter at the loss of the median instance, so that the larger ones leave.
    """
    n, asked = len(case.features), {"target_delta": TARGET_DELTA}
    worst = plan(ledger_of(case)[0], [0], TARGET, **asked, charging=WorstCase()).steps or 0
    bound = largest_threshold(
        phase_of(case),
        training_steps=case.training_steps,
        num_instances=n,
        steps=worst // 2,
        target_epsilon=TARGET,
        target_delta=TARGET_DELTA,
        assumptions=assumptions_of(case),
    )
    scale = np.minimum(1.0, bound / CLIP * (1 - 1e-6) / case.norms)[:, None]
    ratio = float(np.median(case.norms)) * CLIP / case.noise_std
    median = PrivacyFilter(budget=ratio * math.sqrt(case.training_steps) * (1 + 1e-6), family="gaussian")
    ways = {
        "thresholds": (case, None),
        "bounded_rows": (replace(case, features=case.features * scale), None),
        "filter": (case, median),
    }
    figures: dict[str, Figure] = {}
    for name, (used, budget) in ways.items():
        ledger, took_part = ledger_of(used, budget)
        steps = plan_everyone(ledger, TARGET, **asked, levels=16).quantile([0.0, 0.5, 1.0]).tolist()
        for which, count in zip(("easiest", "median", "hardest"), steps, strict=True):
            target = worst // 2 if (name, which) == ("bounded_rows", "hardest") else None
            figures[f"{case.name}_{name}_steps_{which}"] = Figure(value=count, target=target)
        scores = [_trained_accuracy(used, took_part, seed) for seed in range(seeds)]
        mean, half = interval(scores)
        figures[f"{case.name}_{name}_trained_accuracy"] = Figure(value=mean)
        figures[f"{case.name}_{name}_trained_accuracy_half_width_95"] = Figure(value=half)
    return figures


def _trained_accuracy(case: Problem, took_part: NDArray[np.int64], seed: int) -> float:
    start = np.zeros((case.features.shape[1], int(case.labels.max()) + 1))
    everybody, rng = np.ones(len(case.features), dtype=np.bool_), np.random.default_rng(seed)
    return accuracy(case, descend(case, everybody, start, case.training_steps, rng, took_part))


def measure(quick: bool) -> dict[str, Figure]:
    """All figures."""
    figures = published_setting()
    for name, loader in (("digits", load_digits), ("breast_cancer", load_breast_cancer)):
        case, seeds = problem(name, loader), 3 if quick else 20
        figures |= individual_against_worst_case(case, seeds) | ways_of_training(case, seeds)
    return figures


if __name__ == "__main__":
    options = arguments(__doc__)
    report("unlearning_steps", measure(options.quick), options.format)
