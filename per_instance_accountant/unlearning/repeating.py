"""One plan per deletion request, however often the request arrives."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import PlanError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS
from per_instance_accountant.unlearning.execution import read_execution, unplanned_since
from per_instance_accountant.unlearning.mechanism import Mechanism
from per_instance_accountant.unlearning.plan_file import UnlearningPlan
from per_instance_accountant.unlearning.planner import plan, stated_assumptions


def plan_once(
    path: str | os.PathLike[str],
    ledger: Ledger | str | os.PathLike[str],
    ids: Iterable[int | str] | NDArray[Any],
    target_epsilon: float,
    *,
    request_id: str,
    **options: Any,
) -> UnlearningPlan:
    """The plan of ``request_id``: made and saved to ``path`` the first time, read from there ever after.

    options: those of :func:`plan`. The same request with the same content gives the same plan, also when its
    steps are being taken or were taken. Raises PlanError PIA085 when ``path`` holds the plan of another
    request, or this one with other instances, target or options; PIA033 when training went on since;
    CertificateError PIA051 when the file is no plan; everything that :func:`plan` raises, and nothing is
    written then.
    """
    opened, wanted = Ledger.open(ledger), ids if hasattr(ids, "tolist") else list(ids)
    file = Path(path)
    if not file.exists():
        made = plan(opened, wanted, target_epsilon, request_id=request_id, **options)
        if _saved_first(made, file):
            return made
    stored = UnlearningPlan.load(file)
    if stored.request_id != request_id:
        raise _other("the file holds the plan of another request")
    different = _differences(stored, opened, wanted, target_epsilon, options)
    if different:
        raise _other(f"the request was planned with other {' and '.join(different)}")
    if request_status(stored, opened) == "stale":
        raise PlanError(
            "PIA033",
            "the request was planned for an earlier moment, or for another ledger",
            "Its plan covers no step that was taken after it",
            "a new request id and a new file for the plan",
        )
    return stored


def request_status(made: UnlearningPlan, ledger: Ledger) -> str:
    """``"planned"`` (no step of the plan was taken), ``"started"``, ``"carried out"``, or ``"stale"``
    (training went on since, a statistic was published, or the ledger is another one)."""
    if not ledger.holds(made.anchor):
        return "stale"
    taken = ledger.num_steps - made.anchor.steps
    ours = any(phase.plan_digest == made.digest for phase in ledger.phases) or _forgotten_at_once(
        made, ledger
    )
    if not ours and (taken or unplanned_since(ledger, made.anchor.sequence)):
        return "stale"
    if not ours:
        return "planned"
    return "carried out" if taken >= (made.steps or 0) else "started"


def _forgotten_at_once(made: UnlearningPlan, ledger: Ledger) -> bool:
    """Whether a plan of no steps was carried out: the request stands in the ledger where it was planned."""
    if made.steps != 0:
        return False
    wanted = np.sort(ledger.positions_of(list(made.ids)))
    run = read_execution(ledger, first=made.anchor.steps, steps=0, plan_digest=made.digest)
    return any(np.array_equal(np.sort(request), wanted) for request in run.requests)


def _saved_first(made: UnlearningPlan, file: Path) -> bool:
    """Save unless somebody else did in the meantime."""
    mine = file.with_name(f"{file.name}.{os.getpid()}.new")
    made.save(mine)
    try:
        os.link(mine, file)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            mine.unlink()
    return True


def _differences(
    stored: UnlearningPlan, ledger: Ledger, ids: Any, target: float, options: dict[str, Any]
) -> list[str]:
    """Names of what is asked differently now."""
    positions = {"asked": ledger.positions_of(ids), "stored": ledger.positions_of(list(stored.ids))}
    grid, charging = options.get("step_grid"), options.get("charging")
    trained = next((p for p in reversed(ledger.phases) if p.kind == "train"), None)
    usual = stored.mechanism if trained is None else Mechanism.of(trained)
    radius = options.get("projection_radius") or usual.projection_radius
    rate = options.get("learning_rate") or usual.learning_rate
    noise = (options.get("noise_multiplier") or 0.0) * usual.max_grad_norm or usual.noise_std
    limit = options.get("max_steps")
    same = {
        "instances": set(positions["asked"].tolist()) == set(positions["stored"].tolist()),
        "target": (float(target), options.get("order"), options.get("target_delta"))
        == (stored.target, stored.measure.order, stored.measure.delta),
        "direction": options.get("direction", "both") == stored.direction,
        "step grid": (None if grid is None else tuple(grid)) == stored.step_grid,
        "max_steps": (MAX_STEPS if limit is None else limit) == stored.max_steps,
        "charging": (None if charging is None else charging.name) == stored.charging,
        "projection": radius == stored.mechanism.projection_radius,
        "learning rate": rate == stored.mechanism.learning_rate,
        "noise": noise == stored.mechanism.noise_std,
        "assumptions": stated_assumptions(options.get("assumptions"), ledger).to_dict()
        == {name: dict(entry) for name, entry in stored.assumptions.items()},
    }
    return [name for name, equal in same.items() if not equal]


def _other(happened: str) -> PlanError:
    return PlanError(
        "PIA085",
        happened,
        "One request id with two contents would leave open what was promised to whom",
        "a new request id and a new file for the plan",
    )
