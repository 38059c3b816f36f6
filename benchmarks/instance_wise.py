"""Instance-wise unlearning on bundled data: the goals, the regularisers, requests in turn, other methods, and
what the privacy loss saves.

Ten models at once, one per seed; every interval is a 95 % t-interval over the seeds, every difference is
paired by seed. Accuracies are in percent. ``--quick`` takes four seeds and the smaller parts.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn
from torch.func import functional_call, grad, vmap

from benchmarks import Figure, arguments, report
from per_instance_accountant.divergence import sampled_gaussian_rdp
from per_instance_accountant.evaluation import accuracies, margins, membership_attack
from per_instance_accountant.finetuning.methods import (
    Attack,
    Ensemble,
    FineTune,
    GradientAscent,
    Instances,
    InstanceWise,
    Method,
    NegGradPlus,
    NoisyFineTune,
    RandomRelabel,
    Retrain,
    SalUn,
    Schedule,
    Scrub,
    SparseFineTune,
    adversarial_counts,
    calibrate,
    ensemble_of,
    requests_by_loss,
    steps_for,
    unlearn_ensemble,
    unlearn_in_turn,
)
from per_instance_accountant.finetuning.methods.ensemble import fresh

Values = NDArray[np.float64]
SEEDS, QUICK_SEEDS = 10, 4
CHUNKS, LARGEST = 4, 16
CHECKPOINTS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """Trained models of one data set, with what each is asked to forget (K, 16), what it keeps, and the test
    set, all with the leading dimension of seeds; losses: (K, 16) privacy losses of those to forget."""

    name: str
    models: Ensemble
    train: Instances
    forget: Instances
    keep: Instances
    losses: Values
    test: Instances
    radius: float
    replay_share: float | None

    @property
    def seeds(self) -> range:
        return range(self.models.size)

    def split(self, count: int) -> tuple[Instances, Instances]:
        """The first ``count`` instances to forget; the others stay with what is kept."""
        rest = self.forget.select(range(count, len(self.forget))) if count < len(self.forget) else None
        if rest is None:
            return self.forget, self.keep
        kept = Instances(
            inputs=torch.cat([rest.inputs, self.keep.inputs], 1),
            labels=torch.cat([rest.labels, self.keep.labels], 1),
        )
        return self.forget.select(range(count)), kept

    def method(
        self, *, attack: bool, importance: float, replay: bool = False, goal: str = "relabel"
    ) -> InstanceWise:
        relabel = goal == "relabel"
        return InstanceWise(
            schedule=Schedule(steps=1500 if relabel else 600, learning_rate=0.01, weight_decay=1e-4),
            goal="relabel" if relabel else "misclassify",
            attack=Attack(radius=self.radius, per_instance=60) if attack else None,
            importance=importance,
            adversarial_batch=96,
            replay=replay,
            forget_share=self.replay_share if relabel and replay else None if relabel else 0.5,
        )


IMPORTANCE = 0.01
ROWS: dict[str, dict[str, object]] = {
    "plain": {"attack": False, "importance": 0.0},
    "importance": {"attack": False, "importance": IMPORTANCE},
    "adversarial": {"attack": True, "importance": 0.0},
    "both": {"attack": True, "importance": IMPORTANCE},
    "replay": {"attack": False, "importance": 0.0, "replay": True},
}


def perceptron(inputs: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))


def prepare(name: str, seeds: int) -> Bench:
    """Digits: 1,000 for training, pixels in [0, 1]. Breast cancer: 400 for training, features scaled to
    [0, 1] by their extremes."""
    loaded = load_digits() if name == "digits" else load_breast_cancer()
    rows = np.random.default_rng(0).permutation(len(loaded.target))
    values = loaded.data[rows]
    values = (
        (values - values.min(0)) / np.maximum(np.ptp(values, axis=0), 1e-9)
        if name != "digits"
        else values / 16
    )
    inputs, labels = (
        torch.tensor(values, dtype=torch.float32),
        torch.tensor(loaded.target[rows], dtype=torch.int64),
    )
    count = 1000 if name == "digits" else 400
    classes = int(labels.max()) + 1
    train = side_by_side(inputs[:count], labels[:count], seeds)
    schedule = Schedule(steps=150, learning_rate=0.05, weight_decay=5e-4, batch_size=50, observe_every=600)
    trained, losses = privacy_losses(
        fresh(perceptron(inputs.shape[1], classes), range(seeds)), train, schedule
    )
    order = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(1000 + seed)) for seed in range(seeds)]
    )
    gone, kept = order[:, :LARGEST], order[:, LARGEST:]
    offsets = torch.randint(1, classes, gone.shape, generator=torch.Generator().manual_seed(7))
    return Bench(
        name=name,
        models=trained,
        train=train,
        forget=Instances(
            inputs=inputs[gone], labels=labels[gone], targets=(labels[gone] + offsets) % classes
        ),
        keep=Instances(inputs=inputs[kept], labels=labels[kept]),
        losses=np.take_along_axis(losses, gone.numpy(), 1),
        test=side_by_side(inputs[count:], labels[count:], seeds),
        radius=1.5 if name == "digits" else 1.0,
        replay_share=None if name == "digits" else 0.5,
    )


def side_by_side(inputs: torch.Tensor, labels: torch.Tensor, seeds: int) -> Instances:
    return Instances(inputs=inputs.expand(seeds, *inputs.shape), labels=labels.expand(seeds, *labels.shape))


def interval(key: str, values: Values, target: float | None = None) -> dict[str, Figure]:
    """Mean, and the ends of its 95 % t-interval. A target is to be reached by the mean, and with all seeds by
    the lower end as well."""
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    mean = float(values.mean())
    return {
        key: Figure(value=mean, target=target, at_least=True),
        f"{key}_low": Figure(
            value=mean - half, target=target if len(values) >= SEEDS else None, at_least=True
        ),
        f"{key}_high": Figure(value=mean + half),
    }


def goal_table(bench: Bench, goal: str, count: int) -> tuple[dict[str, Figure], dict[str, Values]]:
    """Retained accuracy of each row when it stops; how many reached the goal, steps, attack success."""
    figures, kept_accuracy = {}, {}
    forget, keep = bench.split(count)
    for row, options in ROWS.items():
        method = bench.method(goal=goal, **options)  # type: ignore[arg-type]
        done = unlearn_ensemble(method, bench.models, forget, keep, seeds=bench.seeds)
        kept_accuracy[row] = 100 * accuracies(done.models, keep)
        key = f"{bench.name}_{goal}_k{count}_{row}"
        figures |= interval(f"{key}_retain", kept_accuracy[row])
        figures[f"{key}_test"] = Figure(value=float(100 * accuracies(done.models, bench.test).mean()))
        forgotten = np.mean([trace.forgotten[-1] for trace in done.traces])
        figures[f"{key}_forgotten"] = Figure(value=float(100 * forgotten))
        reached = np.mean([trace.outcome == "reached" for trace in done.traces])
        figures[f"{key}_reached_share"] = Figure(value=float(reached))
        figures[f"{key}_steps"] = Figure(value=float(np.mean([trace.steps for trace in done.traces])))
        if done.traces[0].attack_success is not None:
            success = np.mean([trace.attack_success for trace in done.traces])
            figures[f"{key}_attack_success"] = Figure(value=float(success))
    return figures, kept_accuracy


def regularisers(bench: Bench, quick: bool) -> dict[str, Figure]:
    """Both goals over k, the gains asked for, and how far replay of retained instances is ahead."""
    figures: dict[str, Figure] = {}
    digits = bench.name == "digits"
    for count in (1, 4, 16) if digits and not quick else (4, 16):
        found, kept = goal_table(bench, "relabel", count)
        gain, key = kept["adversarial"] - kept["plain"], f"{bench.name}_k{count}"
        figures |= found | interval(
            f"{key}_gain_of_adversarial", gain, 30.0 if digits and count == 4 else None
        )
        one = np.maximum(kept["adversarial"], kept["importance"])
        both = interval(
            f"{key}_both_minus_best_single", kept["both"] - one, 0.0 if digits and count == 16 else None
        )
        replay = interval(f"{key}_replay_ahead_of_both", kept["replay"] - kept["both"])
        figures |= both | replay
    if digits and not quick:
        figures |= goal_table(bench, "misclassify", LARGEST)[0]
    return figures


def continual(bench: Bench) -> dict[str, Figure]:
    """Four requests of four against one of sixteen; earlier instances kept until the last request or not."""
    method = bench.method(attack=True, importance=IMPORTANCE)
    single = unlearn_ensemble(method, bench.models, bench.forget, seeds=bench.seeds).models
    reference = 100 * accuracies(single, bench.keep)
    figures = interval(f"{bench.name}_single_shot_retain", reference)
    chunks = [bench.forget.select(part) for part in np.array_split(np.arange(LARGEST), CHUNKS)]
    for kept in (True, False):
        run = unlearn_in_turn(method, bench.models, chunks, seeds=bench.seeds, keep_earlier=kept)
        key = f"{bench.name}_continual_{'keeping' if kept else 'dropping'}"
        target = -5.0 if kept and bench.name == "digits" else None
        final = 100 * accuracies(run.models, bench.keep)
        figures |= interval(f"{key}_minus_single_shot", final - reference, target)
        earlier = run.forgotten[:, -1, :-1].mean(1)
        figures |= interval(f"{key}_earlier_still_forgotten", 100 * earlier)
        before = 100 * accuracies(bench.models, bench.keep)
        for turn, stage in enumerate(run.stages, 1):
            now = 100 * accuracies(stage.models, bench.keep)
            figures[f"{key}_damage_of_chunk_{turn}"] = Figure(value=float((before - now).mean()))
            before = now
    return figures


def compared(bench: Bench) -> dict[str, Figure]:
    """Every method on sixteen instances: accuracies, and the attack's score against its null."""
    schedule = Schedule(steps=300, learning_rate=0.02, weight_decay=5e-4, batch_size=50, observe_every=10)
    gentle = replace(schedule, learning_rate=0.005)
    methods: dict[str, Method] = {
        "fine_tune": FineTune(schedule=schedule),
        "noisy_fine_tune": NoisyFineTune(schedule=schedule, noise_std=0.02),
        "gradient_ascent": GradientAscent(schedule=replace(gentle, momentum=0.0, observe_every=1)),
        "neg_grad_plus": NegGradPlus(schedule=gentle, retain_weight=0.95),
        "random_relabel": RandomRelabel(schedule=schedule),
        "salun": SalUn(schedule=schedule, keep=0.5),
        "scrub": Scrub(schedule=gentle, rounds=5),
        "l1_sparse": SparseFineTune(schedule=schedule, strength=5e-4),
        "retrain": Retrain(schedule=replace(schedule, steps=1200, learning_rate=0.05)),
    }
    figures: dict[str, Figure] = {}
    for name, method in methods.items():
        done = unlearn_ensemble(method, bench.models, bench.forget, bench.keep, seeds=bench.seeds)
        key = f"{bench.name}_method_{name}"
        figures |= interval(f"{key}_retain", 100 * accuracies(done.models, bench.keep))
        for part, instances in (("forget", bench.forget), ("test", bench.test)):
            figures[f"{key}_{part}"] = Figure(value=float(100 * accuracies(done.models, instances).mean()))
        scores = membership_attack(done.models, bench.forget, bench.test)
        figures[f"{key}_attack_auc"] = Figure(value=float(np.mean([score.auc for score in scores])))
        inside = np.mean([score.within_null for score in scores])
        figures[f"{key}_attack_within_null"] = Figure(value=float(inside))
    return figures


def privacy_losses(models: Ensemble, train: Instances, schedule: Schedule) -> tuple[Ensemble, Values]:
    """Train in ``CHECKPOINTS`` parts, and charge every instance at the start of each for its steps: (K, n)
    sums of the Renyi divergence of order 2 of a sampled Gaussian with the norms clipped at 1. An ESTIMATE:
    the training itself is neither clipped nor noisy."""

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(models.module, parameters, (x[None],)), y[None])

    slopes = vmap(vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=200))
    rate = schedule.batch_size / len(train)
    total = np.zeros(tuple(train.labels.shape))
    for turn in range(CHECKPOINTS):
        parts = slopes(models.parameters, train.inputs, train.labels).values()
        squares = torch.stack([part.flatten(2).square().sum(2) for part in parts]).sum(0)
        norms = squares.sqrt().clamp(max=1).double().numpy()
        rdp = sampled_gaussian_rdp(rate, norms.ravel(), np.array([2.0]))
        total += schedule.steps * rdp.reshape(norms.shape)
        seeds = [1000 * turn + seed for seed in range(models.size)]
        method = FineTune(schedule=schedule)
        models = unlearn_ensemble(method, models, train.select([0]), train, seeds=seeds).models
    return models, total


def work_by_loss(bench: Bench) -> dict[str, Figure]:
    """Adversarial examples and the order of requests by privacy loss, against the same for all."""
    few = replace(
        bench.method(attack=True, importance=0.0), attack=Attack(radius=bench.radius, per_instance=4)
    )
    counts = np.stack([adversarial_counts(row, total=4 * LARGEST) for row in bench.losses])
    kept = {
        name: 100
        * accuracies(
            unlearn_ensemble(few, bench.models, bench.forget, seeds=bench.seeds, counts=number).models,
            bench.keep,
        )
        for name, number in (("uniform", None), ("by_loss", counts))
    }
    figures = interval(f"{bench.name}_adversarial_by_loss_minus_uniform", kept["by_loss"] - kept["uniform"])
    method, final = bench.method(attack=True, importance=IMPORTANCE), {}
    for first in ("low", "high"):
        order = np.stack([np.concatenate(requests_by_loss(row, CHUNKS, first)) for row in bench.losses])
        chunks = [at(bench.forget, part) for part in np.array_split(order, CHUNKS, axis=1)]
        run = unlearn_in_turn(method, bench.models, chunks, seeds=bench.seeds)
        final[first] = 100 * accuracies(run.models, bench.keep)
    return figures | interval(f"{bench.name}_low_loss_first_minus_high_first", final["low"] - final["high"])


def at(instances: Instances, order: NDArray[np.int64]) -> Instances:
    """Other positions for every model."""
    index = torch.tensor(order)
    targets = None if instances.targets is None else instances.targets.gather(1, index)
    return Instances(
        inputs=torch.stack([x[row] for x, row in zip(instances.inputs, index, strict=True)]),
        labels=instances.labels.gather(1, index),
        targets=targets,
    )


GRID = (0, 20, 40, 80, 160, 320)
GROUPS, MEMBERS, COUNT = 5, 25, 500
TOLERANCE = 0.25
"""Of the mean log odds of the instances to forget, between the fine-tuned and the retrained model."""


def gaps(seeds: range) -> tuple[Values, Values, Values]:
    """Requests of 25 instances from each fifth of the privacy loss, fine-tuned after ``GRID`` steps against
    retraining without them and as many more steps: losses (seeds, groups), mean margin gaps and accuracy gaps
    (seeds, groups, grid)."""
    loaded = load_digits()
    rows = np.random.default_rng(0).permutation(len(loaded.target))[:COUNT]
    inputs = torch.tensor(loaded.data[rows] / 16, dtype=torch.float32)
    labels = torch.tensor(loaded.target[rows], dtype=torch.int64)
    train = side_by_side(inputs, labels, len(seeds))
    schedule = Schedule(steps=96, learning_rate=0.1, weight_decay=5e-3, batch_size=50, observe_every=10_000)
    empty = ensemble_of([perceptron(64, 10)])
    base, losses = privacy_losses(fresh(empty.module, seeds), train, schedule)
    order = np.argsort(losses, axis=1, kind="stable").reshape(len(seeds), GROUPS, -1)
    chosen = np.random.default_rng(1).permuted(order, axis=2)[:, :, :MEMBERS]
    request_losses = np.take_along_axis(losses[:, None], chosen, 2).mean(2)
    flat = chosen.reshape(-1, MEMBERS)
    everywhere = side_by_side(inputs, labels, len(flat))
    others = np.stack([np.setdiff1d(np.arange(COUNT), row) for row in flat])
    forget, keep = at(everywhere, flat), at(everywhere, others)
    repeated = {name: value.repeat_interleave(GROUPS, 0) for name, value in base.parameters.items()}
    unlearned = Ensemble(module=base.module, parameters=repeated, fixed={})
    own = [seed for seed in seeds for _ in range(GROUPS)]
    oracle = fresh(base.module, own)
    for turn in range(CHECKPOINTS):
        part = [1000 * turn + seed - seeds[0] for seed in own]
        oracle = unlearn_ensemble(FineTune(schedule=schedule), oracle, forget, keep, seeds=part).models
    found: list[tuple[Values, Values]] = []
    for turn, (before, after) in enumerate(zip((0, *GRID), GRID, strict=False)):
        if after > before:
            more = FineTune(schedule=replace(schedule, steps=after - before))
            part = [77_000 + 1000 * turn + seed for seed in own]
            unlearned = unlearn_ensemble(more, unlearned, forget, keep, seeds=part).models
            oracle = unlearn_ensemble(more, oracle, forget, keep, seeds=part).models
        margin = margins(unlearned, forget).mean(1) - margins(oracle, forget).mean(1)
        right = 100 * (accuracies(unlearned, forget) - accuracies(oracle, forget))
        found.append((margin, right))
    shape = (len(seeds), GROUPS, len(GRID))
    margin_gaps, accuracy_gaps = (np.stack(part, -1).reshape(shape) for part in zip(*found, strict=True))
    return request_losses, margin_gaps, accuracy_gaps


def steps_by_loss(seeds: int) -> dict[str, Figure]:
    """Steps calibrated on some models, spent on requests to others: what the privacy loss saves against the
    steps of the hardest request for all, and what it costs in distance from retraining."""
    losses, margin_gaps, _ = gaps(range(100, 100 + seeds))
    calibration = calibrate(losses.max(0), np.abs(margin_gaps.mean(0)), GRID, TOLERANCE)
    losses, margin_gaps, accuracy_gaps = gaps(range(200, 200 + seeds))
    known = np.minimum(losses, calibration.losses[-1])
    steps = steps_for(known.ravel(), calibration).reshape(losses.shape)
    most = int(calibration.steps[-1])
    place = np.searchsorted(GRID, steps)[..., None]
    figures = {f"steps_for_fifth_{n}": Figure(value=float(v)) for n, v in enumerate(calibration.steps, 1)}
    figures |= interval("steps_by_loss_saved_share", 1 - steps.mean(1) / max(most, 1), 0.5)
    for name, gap in (("margin", margin_gaps), ("accuracy", accuracy_gaps)):
        adaptive = np.abs(np.take_along_axis(gap, place, 2)[..., 0].mean(0))
        uniform = np.abs(gap[..., GRID.index(most)].mean(0))
        none = np.abs(gap[..., 0].mean(0))
        for label, values in (("adaptive", adaptive), ("uniform", uniform), ("no_steps", none)):
            figures[f"{name}_gap_{label}_worst_fifth"] = Figure(value=float(values.max()))
    figures["margin_gap_adaptive_worst_fifth"] = replace(
        figures["margin_gap_adaptive_worst_fifth"], target=2 * TOLERANCE
    )
    return figures


def digits_part(quick: bool) -> dict[str, Figure]:
    bench = prepare("digits", QUICK_SEEDS if quick else SEEDS)
    figures = interval("digits_before_retain", 100 * accuracies(bench.models, bench.keep))
    figures |= interval("digits_before_test", 100 * accuracies(bench.models, bench.test))
    figures |= regularisers(bench, quick) | continual(bench)
    return figures if quick else figures | compared(bench) | work_by_loss(bench)


def other_part(quick: bool) -> dict[str, Figure]:
    figures = steps_by_loss(2 if quick else SEEDS)
    if quick:
        return figures
    bench = prepare("breast_cancer", SEEDS)
    figures |= interval("breast_cancer_before_retain", 100 * accuracies(bench.models, bench.keep))
    return figures | regularisers(bench, quick) | continual(bench) | compared(bench)


PARTS = (digits_part, other_part)


def run_part(number: int, quick: bool) -> tuple[dict[str, Figure], float]:
    """One part in a process of its own, on one thread, with the CPU seconds it took."""
    torch.set_num_threads(1)
    return PARTS[number](quick), time.process_time()


def main() -> None:
    options = arguments(__doc__)
    start = time.perf_counter()
    with ProcessPoolExecutor(len(PARTS), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run_part, number, options.quick) for number in range(len(PARTS))]
        done = [job.result() for job in jobs]
    figures = {key: figure for part, _ in done for key, figure in part.items()}
    figures["wall_s"] = Figure(value=time.perf_counter() - start, target=60.0 if options.quick else 300.0)
    figures["cpu_s"] = Figure(value=sum(seconds for _, seconds in done))
    report("instance_wise", figures, options.format)


if __name__ == "__main__":
    main()
