# ruff: noqa: E402
"""Individual accounting: time, memory and excess, next to Opacus and dp_accounting doing the same
work in one run.

CPU seconds of one thread, medians; the peers are measured on fewer instances, one at a time as their
interfaces ask.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import resource
import time
import warnings
from collections.abc import Callable

import numpy as np

from benchmarks import Figure, arguments, report
from per_instance_accountant.accounting import Odometer, account
from per_instance_accountant.accounting.levels import Span, tight_epsilon
from per_instance_accountant.divergence import (
    DEFAULT_ORDERS,
    rdp_to_epsilon,
    sampled_gaussian_epsilon,
    sampled_gaussian_rdp,
)
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds

RATE, DELTA = 0.02, 1e-5
ORDERS = np.array(
    [1.25, 1.5, 1.75, *range(2, 33), *range(34, 64, 2), *(2.0 ** np.arange(6, 13.25, 0.5)).round()]
)[:64]
ALPHAS = np.array([1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64)))


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median CPU seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return float(np.median(times))


def trajectories(instances: int, steps: int) -> np.ndarray:
    """(steps, instances) float32 ratios in (0, 1]: mean about 0.3, one in fifteen clipped, falling
    at own speeds."""
    rng = np.random.default_rng(0)
    base, fall = np.exp(rng.normal(-1.6, 0.9, instances)), rng.uniform(0.2, 3, instances)
    t = np.linspace(0.5, -0.5, steps)[:, None]
    wobble = rng.normal(0, 0.25, (steps, instances))
    return np.clip(base * np.exp(fall * t + wobble), 1e-3, 1).astype(np.float32)


def phase(charging: str, noise_std: float = 1.0) -> Phase:
    return Phase(
        kind="train",
        sampling="poisson",
        sample_rate=RATE,
        noise_std=noise_std,
        max_grad_norm=1.0,
        charging=charging,
        denominator=1000.0,
        learning_rate=0.1,
    )


def large_ledger(instances: int, steps: int, sweeps: int) -> Ledger:
    """Steps of 1,000 drawn instances, new thresholds for everybody at evenly spaced steps."""
    rng = np.random.default_rng(1)
    writer = LedgerWriter.create(None, Run(num_instances=instances))
    writer.append(phase("sweep"))
    step = Step(positions=np.arange(1000), contributions=np.full(1000, 1e-3, np.float32))
    for t in range(steps):
        if t % (steps // sweeps) == 0:
            values = np.exp(rng.normal(-1.5, 1, instances)).astype(np.float32)
            writer.append(Thresholds(values=values, source="sweep"))
        writer.append(step)
    return writer.ledger()


def fold_figures(quick: bool) -> dict[str, Figure]:
    instances, steps = (100_000, 1000) if quick else (1_000_000, 10_000)
    ledger = large_ledger(instances, steps, 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = seconds(lambda: account(ledger, orders=ORDERS), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = LedgerWriter.create(None, Run(num_instances=2000))
    thresholds = np.linspace(0.01, 1, 2000).astype(np.float32)
    nobody = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
    for t in range(100 if quick else 1000):
        many.append(phase("fixed_thresholds", 1 + t / 1000))
        if t == 0:
            many.append(Thresholds(values=thresholds, source="fixed"))
        many.append(nobody)
    schedule = many.ledger()
    key = f"fold_{instances}_instances_{steps}_steps_64_orders"
    return {
        f"{key}_cpu_s": Figure(value=spent, target=60),
        f"{key}_peak_gib": Figure(value=peak / 2**20, target=2),
        f"{key}_added_bytes_per_instance": Figure(value=(peak - before) * 1024 / instances),
        "fold_schedule_of_noises_ms_per_mechanism": Figure(
            value=seconds(lambda: account(schedule), 1) * 1e3 / schedule.num_steps
        ),
    }


def excess_figures() -> dict[str, Figure]:
    rng = np.random.default_rng(2)
    values = np.clip(np.exp(rng.normal(-1.6, 0.9, 400)), 1e-3, 1).astype(np.float32)
    writer = LedgerWriter.create(None, Run(num_instances=400))
    writer.append(phase("fixed_thresholds"))
    writer.append(Thresholds(values=values, source="fixed"))
    nobody = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
    for _ in range(1000):
        writer.append(nobody)
    exact = rdp_to_epsilon(DEFAULT_ORDERS, 1000 * sampled_gaussian_rdp(RATE, values, DEFAULT_ORDERS), DELTA)
    ratio = account(writer.ledger()).epsilon(DELTA) / exact
    odometer = Odometer(400, RATE, 1.0)
    odometer.set_bounds(slice(None), values.astype(float) ** 2)
    odometer.advance(1000)
    coarse = odometer.epsilons(DEFAULT_ORDERS, DELTA) / exact
    others = np.clip(np.exp(rng.normal(-1.6, 0.9, 10_000)), 1e-3, 1).astype(np.float32)
    ratios = np.concatenate([values, others])
    tight = tight_epsilon((Span(steps=1000, sample_rate=RATE, ratios=ratios),), DELTA)[:100]
    truth = sampled_gaussian_epsilon(RATE, values[:100], np.eye(100) * 1000, DELTA)
    return {
        "chord_mean_excess": Figure(value=float((ratio - 1).mean()), target=0.005),
        "chord_smallest_ratio_to_exact": Figure(value=float(ratio.min()), target=1 - 1e-9, at_least=True),
        "odometer_mean_excess": Figure(value=float((coarse - 1).mean()), target=0.005),
        "odometer_smallest_ratio_to_exact": Figure(value=float(coarse.min()), target=1 - 1e-9, at_least=True),
        "tight_levels_mean_excess": Figure(value=float((tight / truth - 1).mean()), target=0.01),
    }


def odometer_figures() -> dict[str, Figure]:
    rng = np.random.default_rng(3)
    odometer = Odometer(50_000, RATE, 1.0)
    batches = [rng.choice(50_000, 1000, replace=False) for _ in range(200)]
    squares = [rng.random(1000) ** 2 for _ in batches]

    def train() -> None:
        for batch, square in zip(batches, squares, strict=True):
            odometer.set_bounds(batch, square)
            odometer.advance()

    odometer.epsilons(ORDERS, DELTA)
    return {
        "odometer_step_50000_batch_1000_us": Figure(value=seconds(train, 5) / 200 * 1e6, target=50),
        "odometer_readout_50000_64_orders_ms": Figure(
            value=seconds(lambda: odometer.epsilons(ORDERS, DELTA)) * 1e3, target=60
        ),
        "odometer_bytes_per_instance": Figure(value=odometer.bytes_per_instance, target=700),
    }


def published_figures(paths: np.ndarray, ours: float) -> dict[str, Figure]:
    """What the published tracker needs for the steps and the readout of an instance, its table apart."""
    import torch

    from benchmarks.published_tracker import PublishedTracker

    torch.set_num_threads(1)
    size, steps = 200, 20

    def cost(vectorised: bool) -> float:
        tracker = PublishedTracker(size, RATE, 0.01, vectorised=vectorised)
        rows = torch.tensor(paths[:steps, :size])
        per_step = seconds(lambda: [tracker.step(row.clone()) for row in rows]) / steps
        return (len(paths) * per_step + seconds(lambda: tracker.epsilons(DELTA))) / size

    return {
        "epsilon_1000_steps_times_published": Figure(value=cost(False) / ours, target=500, at_least=True),
        "epsilon_1000_steps_times_published_vectorised": Figure(value=cost(True) / ours),
    }


def peer_figures(quick: bool) -> dict[str, Figure]:
    from dp_accounting.pld import privacy_loss_distribution as pld
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    ratios = np.geomspace(1e-3, 1, 2000)
    ours = seconds(lambda: sampled_gaussian_rdp(RATE, ratios, ALPHAS)) / ratios.size
    some = ratios[::100]

    def opacus() -> None:
        for r in some:
            compute_rdp(q=RATE, noise_multiplier=1 / r, steps=1, orders=ALPHAS)

    kernel = seconds(opacus) / some.size
    instances, steps = (1000, 1000) if quick else (4000, 1000)
    paths = trajectories(instances, steps)
    accountant = RDPAccountant()
    for r in paths[:, 0]:
        accountant.step(noise_multiplier=1 / float(r), sample_rate=RATE)
    theirs = seconds(lambda: accountant.get_epsilon(DELTA), 1)

    def odometer() -> None:
        track = Odometer(instances, RATE, 1.0)
        track.charge(paths.astype(np.float64) ** 2)
        epsilons.append(track.epsilons(ALPHAS, DELTA))

    epsilons: list[np.ndarray] = []
    table = seconds(lambda: Odometer(1, RATE, 1.0).epsilons(ALPHAS, DELTA), 1)
    per_instance = seconds(odometer, 7) / instances
    few = slice(0, instances, instances // 40)
    curves = np.stack([sampled_gaussian_rdp(RATE, path, ALPHAS).sum(axis=0) for path in paths[:, few].T])
    excess = epsilons[0][few] / rdp_to_epsilon(ALPHAS, curves, DELTA) - 1

    levels = np.geomspace(1e-3, 1, 192)
    counts = np.zeros((instances, levels.size))
    rows = np.arange(instances)
    for row in paths:
        counts[rows, np.searchsorted(levels, np.minimum(row, 1) * (1 - 1e-6))] += 1
    cold = seconds(lambda: sampled_gaussian_epsilon(RATE, levels, counts, DELTA), 1)
    warm = seconds(lambda: sampled_gaussian_epsilon(RATE, levels, counts, DELTA)) / instances
    tight = sampled_gaussian_epsilon(RATE, levels, counts, DELTA)
    rdp = rdp_to_epsilon(DEFAULT_ORDERS, counts @ sampled_gaussian_rdp(RATE, levels, DEFAULT_ORDERS), DELTA)
    first = np.flatnonzero(counts[0])

    def by_pld() -> float:
        total = None
        for j in first:
            part = pld.from_gaussian_mechanism(
                1 / levels[j], sampling_prob=RATE, value_discretization_interval=1e-4, use_connect_dots=True
            ).self_compose(int(counts[0, j]))
            total = part if total is None else total.compose(part)
        return float(total.get_epsilon_for_delta(DELTA)) if total else 0.0

    reference: list[float] = []
    peer = seconds(lambda: reference.append(by_pld()), 1)
    return {
        "kernel_us": Figure(value=ours * 1e6),
        "kernel_times_opacus": Figure(value=kernel / ours, target=40, at_least=True),
        "epsilon_1000_steps_us": Figure(value=per_instance * 1e6),
        "epsilon_1000_steps_times_opacus": Figure(value=theirs / per_instance, target=500_000, at_least=True),
        "epsilon_1000_steps_table_ms_once": Figure(value=table * 1e3),
        "epsilon_1000_steps_mean_excess": Figure(value=float(excess.mean()), target=0.005),
        "epsilon_1000_steps_smallest_excess": Figure(value=float(excess.min()), target=0, at_least=True),
        **published_figures(paths, per_instance),
        "tight_warm_ms_per_instance": Figure(value=warm * 1e3, target=0.15),
        "tight_cold_ms_per_instance": Figure(value=cold / instances * 1e3),
        "tight_warm_times_dp_accounting": Figure(value=peer / warm, target=10_000, at_least=True),
        "tight_above_dp_accounting": Figure(value=float(tight[0] - reference[0]), target=1e-4),
        "tight_fallback_share": Figure(value=float((tight >= rdp * (1 - 1e-9)).mean()), target=0.01),
        "tight_median_share_of_rdp": Figure(value=float(np.median(tight / rdp))),
    }


def rare_figures(quick: bool) -> dict[str, Figure]:
    """Runs in which hardly any draw is expected, at fixed thresholds as an audit meets them."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    size = 2000 if quick else 50_000
    ratios = np.clip(np.exp(np.random.default_rng(4).normal(-1.6, 0.9, size)), 1e-3, 1).astype(np.float32)
    figures: dict[str, Figure] = {}
    for rate, steps, delta in ((1e-3, 500, 1e-5), (1e-4, 2000, 1e-8)):
        span = (Span(steps=steps, sample_rate=rate, ratios=ratios),)
        cold = seconds(lambda span=span, delta=delta: tight_epsilon(span, delta), 1)
        warm = seconds(lambda span=span, delta=delta: tight_epsilon(span, delta))
        levels = np.geomspace(0.01, 1, 192)
        counts = np.eye(192) * steps
        each = seconds(lambda: sampled_gaussian_epsilon(rate, levels, counts, delta), 1)  # noqa: B023
        each = seconds(lambda: sampled_gaussian_epsilon(rate, levels, counts, delta)) / 192  # noqa: B023
        tight = sampled_gaussian_epsilon(rate, levels, counts, delta)
        curves = steps * sampled_gaussian_rdp(rate, levels, DEFAULT_ORDERS)
        above = []
        for j in (40, 110, 191):
            law = pld.from_gaussian_mechanism(
                1 / levels[j],
                sampling_prob=rate,
                value_discretization_interval=min(1e-4, tight[j] / 300),
                use_connect_dots=True,
            )
            above.append(tight[j] - law.self_compose(steps).get_epsilon_for_delta(delta))
        key = f"rare_{rate * steps:g}_draws_delta_{delta:g}"
        kept = tight >= rdp_to_epsilon(DEFAULT_ORDERS, curves, delta) * (1 - 1e-9)
        figures |= {
            f"{key}_audit_of_{size}_cold_s": Figure(value=cold),
            f"{key}_audit_ms_per_instance": Figure(value=warm / size * 1e3, target=0.15),
            f"{key}_distinct_runs_ms_each": Figure(value=each * 1e3),
            f"{key}_above_dp_accounting": Figure(value=float(max(above)), target=1e-4),
            f"{key}_fallback_share": Figure(value=float(kept.mean()), target=0.01),
        }
    return figures


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments(__doc__)
    # The fold comes first: its peak memory must not count what the peers import.
    figures = (
        fold_figures(options.quick)
        | excess_figures()
        | odometer_figures()
        | rare_figures(options.quick)
        | peer_figures(options.quick)
    )
    report("accounting", figures, options.format)


if __name__ == "__main__":
    main()
