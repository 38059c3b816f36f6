"""The promises of the toolkit as figures: numbers, files, faults. Writes ``docs/scoreboard.md``.

``python -m benchmarks.scoreboard`` measures all of them; ``--quick`` fewer repetitions, and writes nothing.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import Figure, arguments, machine, report
from benchmarks.exact import one_step_delta, rdp_of_step
from benchmarks.large_ledger import large_ledger
from benchmarks.promises import promises
from per_instance_accountant import account
from per_instance_accountant.accounting import PrivacyFilter
from per_instance_accountant.divergence import (
    gaussian_delta,
    gaussian_epsilon,
    rdp_to_epsilon,
    sampled_gaussian_delta,
    sampled_gaussian_epsilon,
    sampled_gaussian_rdp,
)
from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import (
    Ledger,
    LedgerWriter,
    Phase,
    Run,
    Step,
    merge_parts,
    new_run_id,
)
from per_instance_accountant.ledger.storage import Memory
from per_instance_accountant.ledger.walk import walk_to_end

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scoreboard.md"
RATES = (1e-12, 1e-8, 1e-4, 0.01, 0.1, 0.5, 0.9, 1 - 1e-12)
WHOLE = (2, 3, 8, 64, 256, 1024)
BROKEN = (1 + 2**-26, 1.1, 1.5, 3.7, 58.5, 99.9)
BRACKETS = (
    (0.01, 1.0, 1000),
    (0.1, 0.5, 100),
    (0.5, 0.2, 50),
    (1.0, 0.1, 40),
    (1e-3, 1.0, 10_000),
    (0.004, 0.9, 4000),
    (0.02, 1.5, 500),
    (0.05, 0.7, 2000),
    (0.2, 0.3, 1000),
    (0.25, 2.0, 10),
    (0.9, 0.5, 20),
    (1.0, 1.0, 5),
)
"""Sample rate, sensitivity over noise, steps: each at two values of delta."""
HOLDS: dict[object, str] = {True: "yes", False: "NO", None: ""}
Figures = dict[str, Figure]


def phase_of(**changes: Any) -> Phase:
    settings = {
        "kind": "train",
        "sampling": "poisson",
        "sample_rate": 0.1,
        "noise_std": 1.0,
        "max_grad_norm": 1.0,
        "charging": "worst_case",
        "denominator": 10.0,
        "learning_rate": 0.1,
    }
    return Phase(**(settings | changes))


def step_of(positions: Any, norms: Any = None) -> Step:
    drawn = np.asarray(positions, np.int64)
    return Step(
        positions=drawn, contributions=np.asarray(np.full(drawn.size, 0.5) if norms is None else norms, "f4")
    )


def formulas(quick: bool) -> Figures:
    """Renyi divergences of one step against sums and quadrature in 60 digits, over an extreme grid."""
    ratios = (1e-6, 1e-3, 0.02, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 1e3)
    points = [(q, r, a) for q in RATES for r in ratios for a in WHOLE]
    points += [(q, r, a) for q in RATES for r in ratios if r <= 3 for a in BROKEN]
    worst, below, broken = 0.0, 0, 0
    for rate, ratio, order in points[:: 7 if quick else 1]:
        value, exact = float(sampled_gaussian_rdp(rate, ratio, order)[0, 0]), rdp_of_step(rate, ratio, order)
        infinite = math.isinf(value) and exact < 1e300
        broken += math.isnan(value) or value < 0 or infinite
        below += bool(value < exact)
        worst = max(worst, float(abs(value / exact - 1)))
    return {
        "largest relative error of the Renyi divergence": Figure(value=worst, target=1e-9),
        "Renyi divergences below the exact value": Figure(value=below, target=0),
        "Renyi divergences NaN, negative or infinite without reason": Figure(value=broken, target=0),
        "points of that grid": Figure(value=len(points[:: 7 if quick else 1])),
    }


def conversions(quick: bool) -> Figures:
    """Epsilons and deltas against the exact Gaussian, one exact step, and another library's lower bounds."""
    gauss = step = 0
    for mu in (1e-3, 0.1, 1.0, 5.0):
        for epsilon in (0.0, 0.1, 1.0, 10.0):
            exact = one_step_delta(1.0, mu, epsilon)
            gauss += bool(gaussian_delta(mu, epsilon) < exact)
            if exact > 1e-300:
                delta = float(exact)
                orders = np.array([1.5, 2, 4, 8, 16, 32, 64])
                renyi = rdp_to_epsilon(orders, orders * mu**2 / 2, delta)
                gauss += bool(one_step_delta(1.0, mu, renyi) > delta * (1 + 1e-12))
                gauss += bool(
                    one_step_delta(1.0, mu, float(gaussian_epsilon(mu, delta))) > delta * (1 + 1e-12)
                )
    for rate in (1e-3, 0.1, 0.9):
        for ratio in (0.3, 1.0, 3.0):
            for epsilon in (0.01, 0.5, 2.0):
                bound = float(sampled_gaussian_delta(rate, [ratio], [[1]], epsilon)[0])
                step += bool(bound < one_step_delta(rate, ratio, epsilon))
    return {
        "conversions below the exact Gaussian": Figure(value=gauss, target=0),
        "deltas below one exact sampled step": Figure(value=step, target=0),
        "epsilons below the lower bounds of dp_accounting's loss distributions": Figure(
            value=below_loss_distributions(quick), target=0
        ),
    }


def below_loss_distributions(quick: bool) -> int:
    from dp_accounting.pld import privacy_loss_distribution as pld

    below = 0
    for rate, ratio, steps in BRACKETS[: 2 if quick else None]:
        optimistic = pld.from_gaussian_mechanism(
            1 / ratio, sampling_prob=rate, pessimistic_estimate=False, value_discretization_interval=1e-3
        ).self_compose(steps)
        for delta in (1e-3, 1e-6):
            lower = optimistic.get_epsilon_for_delta(delta) * (1 - 1e-9)
            below += bool(sampled_gaussian_epsilon(rate, [ratio], [[steps]], delta)[0] < lower)
            orders = np.array([1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64])
            curve = steps * sampled_gaussian_rdp(rate, ratio, orders)[0]
            below += bool(rdp_to_epsilon(orders, curve, delta) < lower)
    return below


def duration_of_calls(quick: bool) -> Figures:
    """The longest of many calls with extreme, broken and random arguments, in seconds of CPU."""
    chance = np.random.default_rng(0)
    odd = [0.0, -0.0, 5e-324, 1e-300, 1e-12, 0.5, 1.0, 1e4, 1e300, math.inf, -math.inf, math.nan, -1.0]
    calls: list[Callable[[float, float, float], Any]] = [
        lambda a, b, c: sampled_gaussian_rdp(a, b, c),
        lambda a, b, c: rdp_to_epsilon([abs(c) + 1.5], [a], b),
        lambda a, b, c: gaussian_epsilon(a, b),
        lambda a, b, c: gaussian_delta(a, b),
        lambda a, b, c: sampled_gaussian_epsilon(a, [b], [[1000]], c),
        lambda a, b, c: PrivacyFilter(budget=a, delta=b),
        lambda a, b, c: phase_of(noise_std=a, sample_rate=b, max_grad_norm=c),
    ]
    sampled_gaussian_epsilon(0.1, [0.5], [[10]], 1e-5)
    longest, untyped = 0.0, 0
    for _ in range(300 if quick else 3000):
        first, second, third = chance.choice(odd, size=3)
        call = calls[chance.integers(len(calls))]
        start = time.process_time()
        try:
            call(float(first), float(second), float(third))
        except PiaError:
            pass
        except Exception:
            untyped += 1
        longest = max(longest, time.process_time() - start)
    return {
        "longest call on extreme input, CPU s": Figure(value=longest, target=1.0),
        "errors without a code on extreme input": Figure(value=untyped, target=0),
    }


def sample_log() -> tuple[bytes, bytes, list[int]]:
    """Key and bytes of a small ledger, and where its frames end."""
    writer, ends = LedgerWriter.create(None, Run(num_instances=12)), []
    for event in (
        phase_of(),
        step_of([0, 3]),
        step_of([]),
        step_of([7, 2]),
        phase_of(noise_std=2.0),
        step_of([5]),
    ):
        writer.append(event)
        ends.append(writer.ledger().source.reading().__enter__()[1])
    with writer.source.reading() as (read_at, size):
        return writer.source.key, read_at(size, 0), ends


def steps_in(key: bytes, log: bytes) -> int | None:
    """Steps of a ledger with these bytes; None if it is refused."""
    memory = Memory()
    memory.key = key
    memory.append(log)
    try:
        return walk_to_end(memory).progress.num_steps
    except PiaError:
        return None


def damage(quick: bool) -> Figures:
    """Cuts, zeros, flips and forgeries of the log."""
    key, log, ends = sample_log()
    whole, first = steps_in(key, log), ends[0]
    expected = [steps_in(key, log[: max(e for e in ends if e <= cut)]) for cut in range(first, len(log))]
    places = range(first, len(log))
    cuts = sum(steps_in(key, log[:cut]) != want for cut, want in zip(places, expected, strict=True))
    zeros = 0
    for cut, want in zip(places, expected, strict=True):
        zeros += steps_in(key, log[:cut] + bytes(200)) not in (
            want,
            *([want + 1] if want is not None else []),
        )
    chance, flips = np.random.default_rng(0), 8 * len(log) if not quick else 1000
    bits = chance.permutation(8 * len(log))[:flips]
    accepted = 0
    for bit in bits.tolist():
        flipped = bytearray(log)
        flipped[bit // 8] ^= 1 << bit % 8
        accepted += steps_in(key, bytes(flipped)) is not None
    cut = [0, *ends]
    frames = [log[a:b] for a, b in pairwise(cut)]
    edits = [b"".join([*frames[:i], *frames[i + 1 :]]) for i in range(len(frames) - 1)] + [
        b"".join([*frames[:i], frames[i + 1], frames[i], *frames[i + 2 :]]) for i in range(len(frames) - 1)
    ]
    edits += [b"".join([*frames[: i + 1], *frames[i:]]) for i in range(len(frames))]
    tampered = sum(steps_in(key, edit) is not None for edit in edits) + (steps_in(bytes(32), log) is not None)
    if whole is None:
        raise RuntimeError("the sample is refused")
    return {
        "cuts not recovered to the last whole frame": Figure(value=cuts, target=0),
        "zero tails not recovered": Figure(value=zeros, target=0),
        f"accepted or shortening bit flips, of {len(bits)}": Figure(value=accepted, target=0),
        f"accepted deletions, swaps, repeats and keys, of {len(edits) + 1}": Figure(value=tampered, target=0),
    }


def kills(quick: bool) -> Figures:
    """Writers killed with SIGKILL at random moments, every acknowledged step looked for."""
    count = 20 if quick else 1000
    script = ROOT / "tests" / "ledger" / "crash_loop.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(count), "5"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    found = dict(re.findall(r'"(\w+)": (\d+)', done.stdout))
    bad = sum(int(found[name]) for name in ("lost", "altered", "surplus"))
    return {
        f"steps lost, altered or invented in {found['rounds']} kills": Figure(value=bad, target=0),
        "acknowledged steps in these kills": Figure(value=int(found["steps"])),
    }


def merges(quick: bool) -> Figures:
    """Random runs split over ranks and merged in any order, compared bit by bit."""
    chance, differing = np.random.default_rng(0), 0
    for _ in range(20 if quick else 300):
        world, size = int(chance.integers(2, 6)), int(chance.integers(1, 50))
        phase = phase_of(charging=str(chance.choice(["unamplified", "worst_case"])))
        drawn = [np.flatnonzero(chance.random(size) < 0.3) for _ in range(5)]
        norms = [chance.random(d.size).astype("f4") for d in drawn]
        owner, identity = chance.integers(world, size=size), new_run_id()
        single = written(Run(num_instances=size), phase, zip(drawn, norms, strict=True))
        parts = [
            written(
                Run(num_instances=size, run_id=identity, rank=rank, world_size=world),
                phase,
                [(d[owner[d] == rank], n[owner[d] == rank]) for d, n in zip(drawn, norms, strict=True)],
            )
            for rank in range(world)
        ]
        merged = merge_parts([parts[i] for i in chance.permutation(world)], None)
        same = account(merged).rdp.tobytes() == account(single).rdp.tobytes()
        same &= merged.to_arrow("observations").equals(single.to_arrow("observations"))
        differing += not same
    return {"merges of ranks that differ in a bit from one process": Figure(value=differing, target=0)}


def written(run: Run, phase: Phase, steps: Any) -> Ledger:
    with LedgerWriter.create(None, run) as writer:
        writer.append(phase)
        for positions, norms in steps:
            writer.append(step_of(positions, norms))
    return writer.ledger()


def histories(quick: bool) -> Figures:
    """Random courses of steps, checkpoints, kills and resumes, against a count of what was acknowledged."""
    chance, short = np.random.default_rng(0), 0
    rounds = 100 if quick else 10_000
    # Counts only: in memory where there is such a directory, because each anchor waits for the device.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for number in range(rounds):
            path, taken = Path(folder) / str(number), 0
            writer = LedgerWriter.create(path, Run(num_instances=3))
            writer.append(phase_of())
            anchors = [writer.anchor]
            for move in chance.integers(4, size=8).tolist():
                if move == 3:
                    writer.close()
                    writer = LedgerWriter.resume(path, anchors[chance.integers(len(anchors))])
                    writer.append(phase_of())
                elif move == 2:
                    anchors.append(writer.anchor)
                else:
                    writer.append(step_of([move]))
                    taken += 1
            writer.close()
            short += Ledger.open(path).num_steps != taken
            for file in path.iterdir():
                file.unlink()
    return {f"wrong counts in {rounds} histories of resumes and forks": Figure(value=short, target=0)}


FUZZ = """
import os, random, resource, sys, tempfile
from pathlib import Path
from benchmarks.scoreboard import sample_log
from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import Ledger
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
chance, crashed, idle = random.Random(1), 0, peak()
key, log, _ = sample_log()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder)
    for number in range(int(sys.argv[1])):
        data = bytearray(log)
        for _ in range(chance.randrange(1, 20)):
            place = chance.randrange(len(data))
            kind = chance.randrange(4)
            if kind == 0: data[place] = chance.randrange(256)
            elif kind == 1: del data[place : place + chance.randrange(1, 60)]
            elif kind == 2: data[place:place] = chance.randbytes(chance.randrange(1, 60))
            else: data[place : place + 4] = b"\\xff\\xff\\xff\\x7f"
            data = data or bytearray(b"x")
        (path / "events.log").write_bytes(data)
        (path / "key").write_bytes(key)
        try: list(Ledger.open(path).events())
        except PiaError: pass
        except BaseException: crashed += 1
print(crashed, idle, peak())
"""


def hostile_files(quick: bool) -> Figures:
    """Fuzzed logs opened in a process of their own."""
    count = 200 if quick else 1000
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(count)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    crashed, idle, peak = map(float, done.stdout.split())
    return {
        f"untyped errors on {count} fuzzed ledgers": Figure(value=crashed, target=0),
        "memory they took beyond the libraries, MB": Figure(value=max(0.0, peak - idle), target=100),
    }


def cost_of_a_step(quick: bool) -> Figures:
    """The ledger at batch 4096 with fsync at every step, beside a private step of a small network."""
    chance = np.random.default_rng(0)
    steps = [
        step_of(np.sort(chance.choice(60_000, 4096, replace=False)), chance.random(4096)) for _ in range(20)
    ]
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        writer = LedgerWriter.create(Path(folder) / "run", Run(num_instances=60_000), fsync="step")
        writer.append(phase_of())
        walls = []
        for step in steps:
            start = time.perf_counter()
            writer.append(step)
            walls.append(time.perf_counter() - start)
        writer.close()
    training = private_step(1 if quick else 3)
    share = float(np.median(walls)) / training
    return {
        "ledger at batch 4096 with fsync, ms per step (wall)": Figure(value=1e3 * float(np.median(walls))),
        "private step at batch 4096 (784-32-10, Opacus), ms (wall)": Figure(value=1e3 * training),
        "ledger's share of the step": Figure(value=share, target=0.05),
    }


def private_step(repetitions: int) -> float:
    """Seconds of one step of stock Opacus at batch 4096, the best of several."""
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = GradSampleModule(
        torch.nn.Sequential(torch.nn.Linear(784, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    )
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4096,
    )
    x, y, times = torch.randn(4096, 784), torch.randint(0, 10, (4096,)), []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return min(times[1:])


MEASUREMENTS: tuple[Callable[[bool], Figures], ...] = (
    formulas,
    conversions,
    duration_of_calls,
    promises,
    kills,
    damage,
    merges,
    histories,
    hostile_files,
    cost_of_a_step,
    large_ledger,
)


def page(figures: Figures) -> str:
    """The table as Markdown."""
    rows = []
    for name, figure in figures.items():
        target = (
            ""
            if figure.target is None
            else ("at least " if figure.at_least else "at most ") + f"{figure.target:g}"
        )
        holds = HOLDS[figure.as_dict()["holds"]]
        rows.append(f"| {name} | {figure.value:.4g} | {target} | {holds} |")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "torch", "opacus"))
    head = f"""# Scoreboard

What the toolkit promises about numbers, files and faults, as figures. Written by
`python -m benchmarks.scoreboard` on {datetime.now(UTC).date().isoformat()}; {machine()}; {libraries}.
Exact values: sums and quadrature in 60 digits (`benchmarks/exact.py`). The machine did other work as well.

| figure | measured | target | holds |
|---|---|---|---|
"""
    return (
        head
        + "\n".join(rows)
        + "\n\nFigures about laws, mutants and audits: [verification](verification.md).\n"
    )


if __name__ == "__main__":
    options = arguments(__doc__)
    measured: Figures = {}
    for measurement in MEASUREMENTS:
        began = time.process_time()
        measured |= measurement(options.quick)
        print(f"{measurement.__name__}: {time.process_time() - began:.1f} s CPU", file=sys.stderr)
    if not options.quick:
        PAGE.write_text(page(measured))
    report("scoreboard", measured, options.format)
