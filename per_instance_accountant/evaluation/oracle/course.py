"""Unlearning step by step beside its retrained reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.oracle.training import Ids, PairedTraining, Training, part
from per_instance_accountant.evaluation.outcomes import accuracies, margins, outputs
from per_instance_accountant.finetuning.methods import Ensemble, Instances
from per_instance_accountant.finetuning.methods.ensemble import Weights

Reals = NDArray[np.float64]
Kept = tuple[tuple[Ensemble, ...], tuple[Ensemble, ...]]
_MEMBERS = 256
"""Models trained at once: more do not fit into the cache of one core."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Course:
    """R requests of n instances each, S seeds, observed after ``at`` (t,) steps of unlearning.

    unlearned, oracle: (R, S, t, n) margins of the instances to forget. unlearned_right, oracle_right: whether
    they are classified correctly. base: the S trained models. kept: what the models themselves are kept of:
    unlearned and oracle, each before, in the middle (look ``t // 2``) and after, with R * S members. retain:
    (2, 3, R, S) their accuracy on what each retains; test: the same on the test instances, None without them.
    Oracles are budget-matched: at look t they were trained for ``training.steps + at[t]`` steps.
    """

    at: NDArray[np.int64]
    requests: NDArray[np.int64]
    unlearned: Reals
    oracle: Reals
    unlearned_right: Reals
    oracle_right: Reals
    retain: Reals
    test: Reals | None
    base: Ensemble
    kept: Kept


def checked_requests(requests: Ids, count: int) -> NDArray[np.int64]:
    """(R, n) positions. Raises UsageError PIA126 for no request, an empty one, requests of different
    sizes, or one that leaves nothing; PIA071 for positions that are not there.

    >>> checked_requests([[3], [1]], 10).tolist()
    [[3], [1]]
    """
    rows = [np.asarray(request, dtype=np.int64).ravel() for request in requests]
    sizes = {row.size for row in rows}
    if len(sizes) != 1 or min(sizes) == 0 or max(sizes) >= count:
        raise UsageError(
            "PIA126",
            f"{len(rows)} requests with sizes {sorted(sizes)} of {count} instances",
            "Without an instance to forget, and some to keep, there is nothing to compare",
            "requests=[[3], [17]] or groups of one size",
        )
    table: NDArray[np.int64] = np.stack(rows)
    if table.min() < 0 or table.max() >= count:
        raise UsageError(
            "PIA071",
            f"some requests name positions outside 0 .. {count - 1}",
            "Nothing was trained",
            "requests=[[3], [17]] with positions of the training set",
        )
    return table


def unlearning_course(
    start: Ensemble,
    train: Instances,
    requests: Ids,
    training: Training,
    *,
    seeds: Sequence[int],
    at: Sequence[int],
    fine_tuning: Training | None = None,
    test: Instances | None = None,
    device: str | torch.device = "cpu",
) -> Course:
    """Train with and without each request, then fine-tune both without it: the unlearned model and its
    oracle, on the same batches with the same noise.

    start: S models, one per seed. at: increasing numbers of steps of unlearning, from 0. fine_tuning:
    setting of the unlearning (its ``steps`` are ignored), None for that of the training. The
    expectation over seeds of every margin is that of independent runs; only the noise of differences is
    smaller. Raises UsageError PIA126, PIA070, PIA071, GuaranteeError PIA011.
    """
    looks = np.asarray(at, dtype=np.int64)
    if looks.size < 1 or looks[0] != 0 or (np.diff(looks) <= 0).any():
        raise UsageError(
            "PIA070",
            f"{looks.size} looks that do not increase from 0",
            "Nothing was trained",
            "at=[0, 10, 20, 40, 80]",
        )
    table = checked_requests(requests, len(train))
    width = max(1, _MEMBERS // len(seeds))
    pieces = [table[begin : begin + width] for begin in range(0, len(table), width)]
    tuned = fine_tuning or training
    runs = [_piece(start, train, rows, training, tuned, seeds, looks, device) for rows in pieces]
    both = [np.concatenate([run.seen[which] for run in runs]) for which in (0, 1)]
    unlearned, oracle = (
        tuple(joined([run.kept[which][when] for run in runs]) for when in range(3)) for which in (0, 1)
    )
    others = [np.setdiff1d(np.arange(len(train)), row) for row in table]
    return Course(
        at=looks,
        requests=table,
        unlearned=both[0][..., 0],
        oracle=both[1][..., 0],
        unlearned_right=both[0][..., 1],
        oracle_right=both[1][..., 1],
        retain=_by_request((unlearned, oracle), len(seeds), [train.select(rows) for rows in others]),
        test=None if test is None else _by_request((unlearned, oracle), len(seeds), [test] * len(table)),
        base=runs[0].base,
        kept=(unlearned, oracle),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Piece:
    seen: tuple[Reals, Reals]
    kept: Kept
    base: Ensemble


def _piece(
    start: Ensemble,
    train: Instances,
    rows: NDArray[np.int64],
    training: Training,
    tuned: Training,
    seeds: Sequence[int],
    looks: NDArray[np.int64],
    device: str | torch.device,
) -> _Piece:
    everybody = [[], *rows.tolist()]
    run = PairedTraining(start, train, training, seeds=seeds, without=everybody, device=device)
    run.advance(training.steps)
    base = part(run.models, range(len(seeds)))
    unlearned = run.fork(tuned, rows.tolist(), 0)
    run.go_on_with(tuned)
    forget = _members(train, rows, len(seeds))
    seen: tuple[list[Reals], list[Reals]] = ([], [])
    kept: tuple[list[Ensemble], list[Ensemble]] = ([], [])
    when = (0, len(looks) // 2, len(looks) - 1)
    for look, (before, after) in enumerate(zip((0, *looks[:-1].tolist()), looks.tolist(), strict=True)):
        for which, going in enumerate((unlearned, run)):
            going.advance(after - before)
            models = going.models if which == 0 else part(going.models, range(len(seeds), going.models.size))
            seen[which].append(_looked(models, forget))
            kept[which].extend([models] * when.count(look))
    shape = (len(rows), len(seeds), len(looks), rows.shape[1], 2)
    stacked = [np.stack(values, 1).reshape(shape) for values in seen]
    return _Piece(seen=(stacked[0], stacked[1]), kept=(tuple(kept[0]), tuple(kept[1])), base=base)


def _members(train: Instances, rows: NDArray[np.int64], seeds: int) -> Instances:
    index = torch.from_numpy(np.repeat(rows, seeds, axis=0))
    return Instances(inputs=train.inputs[index], labels=train.labels[index])


def _looked(models: Ensemble, forget: Instances) -> Reals:
    """(members, n, 2): margin, and 1 where the instance is classified as its label."""
    right = outputs(models, forget).argmax(-1) == forget.labels
    return np.stack([margins(models, forget), right.double().numpy()], -1)


def _by_request(kept: Kept, seeds: int, instances: Sequence[Instances]) -> Reals:
    """(2, 3, R, S) accuracies of every request's models on its own instances."""
    found = np.empty((2, 3, len(instances), seeds))
    for which, when, row in np.ndindex(2, 3, len(instances)):
        members = part(kept[which][when], range(row * seeds, (row + 1) * seeds))
        found[which, when, row] = accuracies(members, spread(instances[row], seeds))
    return found


def spread(instances: Instances, models: int) -> Instances:
    """The same instances for every one of several models, without copying."""
    targets = None if instances.targets is None else instances.targets.expand(models, -1)
    return replace(
        instances,
        inputs=instances.inputs.expand(models, *instances.inputs.shape),
        labels=instances.labels.expand(models, -1),
        targets=targets,
    )


def joined(parts: Sequence[Ensemble]) -> Ensemble:
    """Ensembles of one architecture, one after another."""

    def together(values: Sequence[Weights]) -> Weights:
        return {name: torch.cat([value[name] for value in values]) for name in values[0]}

    return Ensemble(
        module=parts[0].module,
        parameters=together([one.parameters for one in parts]),
        fixed=together([one.fixed for one in parts]),
    )
