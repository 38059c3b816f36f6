"""Certified steps over measured ones, and lower bounds on epsilon against the claim: softmax
regression, where the product certifies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_wine
from torch import nn

from benchmarks import Figure
from benchmarks.evidence.cases import Case, with_noise
from benchmarks.evidence.losses import recorded_run, softmax_thresholds
from benchmarks.evidence.prediction import spread_over
from per_instance_accountant import account
from per_instance_accountant.divergence import gaussian_epsilon
from per_instance_accountant.evaluation import Training, empirical_epsilon, margins, one_run_epsilon
from per_instance_accountant.evaluation.oracle import PairedTraining
from per_instance_accountant.evaluation.oracle.course import spread
from per_instance_accountant.evaluation.oracle.training import part
from per_instance_accountant.finetuning.methods import Ensemble, Instances
from per_instance_accountant.unlearning import plan_everyone, softmax_regression

Reals = NDArray[np.float64]
TARGET, DELTA = 0.5, 1e-5
BIAS = 0.2


def softmax_case(name: str, count: int, noise_std: float, steps: int) -> Case:
    """Full-batch Langevin training of softmax regression; rows have norm at most 1 and a constant last
    entry."""
    loaded = (load_digits if name == "digits" else load_wine)()
    rows = np.random.default_rng(0).permutation(len(loaded.target))
    values = loaded.data[rows]
    values = values / 80 if name == "digits" else (values - values.mean(0)) / values.std(0) / 6
    values = np.column_stack([values, np.full(len(values), BIAS)])
    values *= np.minimum(1.0, (1 - 1e-6) / np.linalg.norm(values, axis=1))[:, None]
    inputs = torch.tensor(values, dtype=torch.float32)
    labels = torch.tensor(loaded.target[rows], dtype=torch.int64)
    return Case(
        name=name,
        train=Instances(inputs=inputs[:count], labels=labels[:count]),
        test=Instances(inputs=inputs[count:], labels=labels[count:]),
        module=nn.Linear(inputs.shape[1], int(labels.max()) + 1, bias=False),
        noisy=Training(
            steps=steps,
            learning_rate=1.0,
            sample_rate=1.0,
            denominator=float(count),
            weight_decay=0.02,
            noise_std=noise_std,
        ),
        clip=1.42,
    )


def certified_losses(case: Case, seed: int) -> tuple[Any, Any]:
    """Ledger of one recorded run with thresholds known from the inputs, and its CERTIFIED losses."""
    norms = case.train.inputs.double().norm(dim=1).numpy()
    thresholds = replace(softmax_thresholds(case), thresholds=1.4143 * norms)
    known = softmax_regression(
        feature_norm=1.0,
        num_instances=len(case.train),
        denominator=case.noisy.denominator,
        individual_thresholds=True,
    ).to_dict()
    ledger = recorded_run(case, case.noisy, seed, charging=thresholds, assumptions=known)
    return ledger, account(ledger)


def flat(models: Ensemble) -> Reals:
    return torch.cat([value.flatten(1) for value in models.parameters.values()], 1).double().numpy()


def measured_epsilon(unlearned: Reals, oracle: Reals) -> float:
    """Epsilon of two normal laws with the measured distance of means and spread along it; (S, p)
    weights."""
    shift = (unlearned - oracle).mean(0)
    size = float(np.linalg.norm(shift))
    spread_along = float((oracle @ (shift / max(size, 1e-300))).std(ddof=1))
    return float(np.atleast_1d(gaussian_epsilon(size / spread_along, DELTA))[0])


def theory_curve(requests: int, seeds: range) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Steps after which unlearned and retrained weights are within (0.5, 1e-5): certified for each of
    some digits, and measured by a Gaussian plug-in from paired runs. Certified must not be below
    measured."""
    case = softmax_case("digits", 300, 6.0, 150)
    ledger, loss = certified_losses(case, 0)
    everyone = plan_everyone(ledger, TARGET, target_delta=DELTA, levels=64)
    scores = loss.rdp[:, 0]
    chosen = spread_over(scores, requests)
    looks = np.unique(np.geomspace(1, 400, 24).astype(int))
    run = PairedTraining(
        case.start(seeds), case.train, case.noisy, seeds=seeds, without=[[], *chosen[:, None].tolist()]
    )
    run.advance(case.noisy.steps)
    after = run.fork(case.noisy, chosen[:, None].tolist(), 0)
    at, rows = [0, *looks.tolist()], []
    for before, now in zip((0, *at[:-1]), at, strict=True):
        run.advance(now - before)
        after.advance(now - before)
        oracle = flat(part(run.models, range(len(seeds), run.models.size)))
        pairs = (values.reshape(len(chosen), len(seeds), -1) for values in (flat(after.models), oracle))
        rows.append([measured_epsilon(a, b) for a, b in zip(*pairs, strict=True)])
    epsilons = np.array(rows)
    reached = epsilons <= TARGET
    measured = np.where(reached.any(0), np.array(at)[reached.argmax(0)], np.inf)
    certified = everyone.steps[chosen]
    both = np.isfinite(measured) & np.isfinite(certified)
    figures = {
        "theory_certified_below_measured": Figure(
            value=float((certified < measured)[both].sum()), target=0.0
        ),
        "theory_certified_steps_median": Figure(value=float(np.median(certified))),
        "theory_measured_steps_median": Figure(value=float(np.median(measured[both]))),
        "theory_certified_over_measured_median": Figure(
            value=float(np.median(certified[both] / np.maximum(measured[both], 1)))
        ),
    }
    drawn = {
        "at": at,
        "epsilon_measured_quantiles": np.quantile(epsilons, [0, 0.5, 1], axis=1).tolist(),
        "certified": certified.tolist(),
        "measured": measured[both].tolist(),
        "loss": scores[chosen].tolist(),
    }
    return figures, drawn


def canary_curve(runs: int, noises: tuple[float, ...]) -> tuple[dict[str, Figure], dict[str, Any]]:
    """One mislabelled wine with the largest threshold as canary: lower bounds on epsilon at delta 1e-5
    from runs with and without it against the CERTIFIED claim, per noise level; without against without
    as null."""
    figures: dict[str, Figure] = {}
    drawn: dict[str, Any] = {"noise": list(noises), "claim": [], "bound": [], "null": []}
    for noise in noises:
        case = planted(softmax_case("wine", 60, noise, 30))
        canary = int(case.train.inputs.norm(dim=1).argmax())
        _, loss = certified_losses(case, 0)
        claim = float(loss.certified_epsilon(DELTA)[canary])
        kinds = {"with": [], "without": [canary], "other": [canary]}
        scores = {}
        for turn, (kind, without) in enumerate(kinds.items()):
            seeds = range(10_000 * turn, 10_000 * turn + runs)
            run = PairedTraining(case.start(seeds), case.train, case.noisy, seeds=seeds, without=[without])
            run.advance(case.noisy.steps)
            scores[kind] = margins(run.models, spread(case.train.select([canary]), runs))[:, 0]
        bound = empirical_epsilon(scores["with"], scores["without"], delta=DELTA).epsilon
        null = empirical_epsilon(scores["other"], scores["without"], delta=DELTA).epsilon
        figures[f"canary_noise_{noise:g}_claim"] = Figure(value=claim)
        figures[f"canary_noise_{noise:g}_lower_bound"] = Figure(value=bound, target=claim)
        figures[f"canary_noise_{noise:g}_null"] = Figure(value=null, target=0.05)
        for name, value in (("claim", claim), ("bound", bound), ("null", null)):
            drawn[name].append(value)
    return figures | one_run(noises[0]), drawn


def planted(case: Case) -> Case:
    """The instance with the largest norm gets a wrong label."""
    canary = int(case.train.inputs.norm(dim=1).argmax())
    labels = case.train.labels.clone()
    labels[canary] = (labels[canary] + 1) % (int(labels.max()) + 1)
    return replace(case, train=Instances(inputs=case.train.inputs, labels=labels))


def one_run(noise_std: float) -> dict[str, Figure]:
    """One run on digits with 200 mislabelled canaries, each in by a coin; the margin of its label is
    the score."""
    base = softmax_case("digits", 400, noise_std, 30)
    generator = np.random.default_rng(8)
    canaries = np.arange(200)
    labels = base.train.labels.clone()
    labels[:200] = (labels[:200] + torch.from_numpy(generator.integers(1, 10, 200))) % 10
    case = replace(base, train=Instances(inputs=base.train.inputs, labels=labels))
    _, loss = certified_losses(case, 0)
    claim = float(loss.certified_epsilon(DELTA)[canaries].max())
    coins = generator.random(200) < 0.5
    seeds = range(77, 78)
    run = PairedTraining(
        case.start(seeds),
        case.train,
        with_noise(case.noisy, noise_std),
        seeds=seeds,
        without=[canaries[~coins]],
    )
    run.advance(case.noisy.steps)
    scores = margins(run.models, case.train.select(canaries).stacked)[0]
    bound = one_run_epsilon(scores, coins, delta=DELTA).epsilon
    shuffled = one_run_epsilon(scores, generator.permutation(coins), delta=DELTA).epsilon
    return {
        "one_run_claim": Figure(value=claim),
        "one_run_lower_bound": Figure(value=bound, target=claim),
        "one_run_null": Figure(value=shuffled, target=0.5),
    }
