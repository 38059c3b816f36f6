"""``pia demo``: the whole path on real data, from DP-SGD with Opacus to a verified certificate."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from per_instance_accountant.accounting import LastSeen
from per_instance_accountant.audit import audit
from per_instance_accountant.audit.budget import BudgetAudit
from per_instance_accountant.audit.rounding import rounded_up
from per_instance_accountant.cli import demo_training as training
from per_instance_accountant.cli.demo_evidence import measure, snapshot
from per_instance_accountant.cli.printing import SENSITIVE, Format, Page, Table, emit
from per_instance_accountant.errors import UsageError
from per_instance_accountant.finetuning import run_plan
from per_instance_accountant.finetuning.files import save_module
from per_instance_accountant.report import Evidence
from per_instance_accountant.results.files import write_private
from per_instance_accountant.unlearning import UnlearningPlan, plan, plan_everyone, verify

DELTA = 1e-5
ORDER, TARGET = 8.0, 0.1
STEPS = 300
ACCURACY_SEEDS = 4
_OWN = ("convex", "network", "sgld", "unlearned", "plan.json", "certificate.json", "demo.json", "convex.pt")
_EVIDENCE = "evidence.json"
_PAGE = "report.html"


def _prepare(output: Path) -> None:
    """An empty directory, or one that an earlier demonstration wrote, whose artefacts are replaced."""
    if output.exists() and any(output.iterdir()) and not (output / "demo.json").exists():
        raise UsageError(
            "PIA070",
            f"{output} exists and holds files that no demonstration wrote",
            "They were left as they are",
            "pia demo --output another-directory",
        )
    output.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (*_OWN, _EVIDENCE, _PAGE):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # Marks the directory before the first artefact, so that an interrupted run can be repeated.
    (output / "demo.json").touch(mode=0o600)


def _hardest_and_easiest(result: BudgetAudit) -> list[int]:
    """The request: the largest, the smallest and three instances in between, by individual epsilon."""
    order = np.argsort(result.epsilon, kind="stable")
    return sorted(
        int(result.ids[order[i]]) for i in np.linspace(0, len(order) - 1, training.FORGET).astype(int)
    )


def _retain(digits: training.Digits, ids: list[int]) -> Subset[Any]:
    return Subset(digits.train, np.setdiff1d(np.arange(training.TRAINING_SET), ids).tolist())


def _train_and_forget(
    digits: training.Digits, seed: int, directory: Path, ids: list[int] | None = None
) -> dict[str, Any]:
    """Train the convex model, audit it, plan the deletion of ``ids`` (chosen from the audit for None), run
    it, verify it, and retrain for comparison with the same seed."""
    engine, model = training.train_convex(digits, seed=seed, ledger=directory / "convex", steps=STEPS)
    engine.close()
    checkpoint = directory / "convex.pt"
    save_module(model, checkpoint)
    # The tight conversion takes seconds, and further seeds only ask for accuracies.
    result = audit(directory / "convex", DELTA, tight=ids is None)
    ids = _hardest_and_easiest(result) if ids is None else ids
    made = plan(directory / "convex", ids=ids, target_epsilon=TARGET, order=ORDER)
    made.save(directory / "plan.json")
    run = run_plan(
        made,
        ledger=directory / "convex",
        module=training.convex_model(),
        dataset=_retain(digits, ids),
        criterion=nn.CrossEntropyLoss(),
        checkpoint=checkpoint,
        output=directory / "unlearned",
        seed=seed,
    )
    _, retrained = training.train_convex(
        digits, seed=seed, ledger=None, steps=STEPS, without=ids, continued=made.steps or 0
    )
    report = verify(run.certificate, ledger=directory / "convex", checkpoint=run.checkpoint)
    return {
        "audit": result,
        "engine": engine,
        "plan": made,
        "run": run,
        "report": report,
        "models": {
            "original": snapshot(model),
            "unlearned": snapshot(run.module),
            "retrained": snapshot(retrained),
        },
        "accuracy": {
            "original": digits.accuracy(model),
            "unlearned": digits.accuracy(run.module),
            "retrained": digits.accuracy(retrained),
        },
    }


def _further_seeds(
    first: dict[str, Any], digits: training.Digits, seed: int, ids: list[int]
) -> list[dict[str, Any]]:
    """The first run and those of further seeds, with the same request."""
    runs = [first]
    for extra in tqdm(
        range(1, ACCURACY_SEEDS), desc="accuracy over seeds", unit="seed", disable=None, leave=False
    ):
        with tempfile.TemporaryDirectory() as scratch:
            runs.append(_train_and_forget(digits, seed + extra, Path(scratch), ids))
    return runs


def _mean_accuracies(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [run["accuracy"] for run in runs]
    means: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return means | {"seeds": len(rows), "each": rows}


def _network(digits: training.Digits, seed: int, output: Path) -> dict[str, Any]:
    engine, model = training.train_network(digits, seed=seed, ledger=output / "network", steps=STEPS)
    engine.close()
    return {
        "swept": audit(output / "network", DELTA),
        "last_seen": audit(output / "network", DELTA, charging=LastSeen()),
        "epsilon_opacus": float(engine.get_epsilon(DELTA)),
        "accuracy": digits.accuracy(model),
    }


def _sgld(digits: training.Digits, seed: int, output: Path, ids: list[int]) -> dict[str, Any]:
    engine, model = training.train_sgld(
        digits, seed=seed, ledger=output / "sgld", steps=STEPS, step_size=1.9, temperature=1.33e-4
    )
    engine.close()
    made = plan(output / "sgld", ids=ids, target_epsilon=TARGET, order=ORDER)
    return {"audit": audit(output / "sgld", DELTA), "plan": made, "accuracy": digits.accuracy(model)}


def _plan_summary(made: UnlearningPlan) -> dict[str, Any]:
    return {
        "steps": made.steps,
        "bound": made.bound,
        "value": made.value,
        "order": made.measure.order,
        "target_epsilon": made.target,
        "training_steps": made.training_steps,
        "cost_ratio": made.cost_ratio,
        "deciding_id": made.deciding_id,
        "requested": len(made.ids),
    }


def _document(
    convex: dict[str, Any], network: dict[str, Any], sgld: dict[str, Any], output: Path
) -> dict[str, Any]:
    swept: BudgetAudit = network["swept"]
    return swept.to_dict() | {
        "epsilon_opacus": network["epsilon_opacus"],
        "neural_network": swept.to_dict()
        | {"by_digit": swept.by_group("digit"), "top": swept.top(5), "accuracy": network["accuracy"]},
        "last_seen": network["last_seen"].to_dict(),
        "convex": convex["audit"].to_dict()
        | {
            "epsilon_opacus": convex["epsilon_opacus"],
            "by_digit": convex["audit"].by_group("digit"),
            "top": convex["audit"].top(5),
        },
        "plan": _plan_summary(convex["plan"]),
        "certificate": {
            "valid": bool(convex["report"].valid),
            "checks": [{"check": c.name, "status": c.status} for c in convex["report"].checks],
        },
        "accuracy": convex["accuracy"],
        "claims": [
            {"name": claim.name, "claimed": claim.claimed, "measured_at_least": claim.lower}
            for claim in convex["evidence"].claims
        ],
        "sgld": sgld["audit"].to_dict() | {"plan": _plan_summary(sgld["plan"]), "accuracy": sgld["accuracy"]},
        "artefacts": {
            "ledger": str(output / "convex"),
            "network_ledger": str(output / "network"),
            "sgld_ledger": str(output / "sgld"),
            "report": str(output / _PAGE),
            "evidence": str(output / _EVIDENCE),
            "plan": str(output / "plan.json"),
            "certificate": str(output / "certificate.json"),
            "checkpoint": str(convex["run"].checkpoint),
        },
        "notice": SENSITIVE,
    }


def run(
    *, seed: int = 0, output: str | os.PathLike[str] = "pia-demo", output_format: Format = Format.TABLE
) -> bool:
    """Run the demonstration and print it. True if every check held. Writes its artefacts under ``output``."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # Opacus says at every construction that the noise is not cryptographic, torch that inputs need no
        # gradient.
        warnings.filterwarnings("ignore", message="Secure RNG turned off")
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        return _run(seed, Path(output), output_format)


def _run(seed: int, directory: Path, output_format: Format) -> bool:
    _prepare(directory)
    digits = training.load_data(seed)
    print("pia demo: scikit-learn's digits, trained with Opacus on this machine", file=sys.stderr)
    convex = _train_and_forget(digits, seed, directory)
    convex["epsilon_opacus"] = float(convex["engine"].get_epsilon(DELTA))
    shutil.copy(convex["run"].certificate, directory / "certificate.json")
    network = _network(digits, seed, directory)
    sgld = _sgld(digits, seed, directory, list(convex["plan"].ids))
    ids = list(convex["plan"].ids)
    runs = _further_seeds(convex, digits, seed, ids)
    convex["evidence"] = measure(
        digits,
        [run["models"] for run in runs],
        ids,
        seed=seed,
        steps=STEPS,
        claimed=convex["audit"].worst_case_tight,
        delta=DELTA,
    )
    convex["accuracy"] = _mean_accuracies(runs)
    _write_page(convex["audit"], convex["evidence"], directory)
    document = _document(convex, network, sgld, directory)
    write_private(directory / "demo.json", json.dumps(document, indent=2, default=float).encode())
    emit(_page(document, convex, network), output_format)
    return bool(document["certificate"]["valid"])


def _write_page(result: BudgetAudit, evidence: Evidence, output: Path) -> None:
    """The page of the convex run as it was before anybody was forgotten."""
    everyone = plan_everyone(result.ledger or output / "convex", TARGET, order=ORDER)
    evidence.save(output / _EVIDENCE)
    result.report(
        output / _PAGE,
        everyone=everyone,
        evidence=evidence,
        title="Individual privacy budgets of the digits",
    )


def _rows(name: str, result: BudgetAudit) -> list[dict[str, Any]]:
    summary = result.to_dict()
    quantiles = summary["epsilon_quantiles"]
    shown = {"p10": quantiles["0.1"], "median": quantiles["0.5"], "p90": quantiles["0.9"]}
    return [{"run": name, **shown, "max": summary["epsilon_max"], "basis": result.basis}]


def _worst(name: str, result: BudgetAudit, opacus: float) -> dict[str, Any]:
    return {"run": name, "worst case": result.worst_case, "Opacus' accountant": opacus, "basis": "CERTIFIED"}


def _page(document: dict[str, Any], convex: dict[str, Any], network: dict[str, Any]) -> Page:
    made, accuracy = document["plan"], document["accuracy"]
    sgld = document["sgld"]
    budgets = _rows("convex, DP-SGD", convex["audit"]) + _rows("network, DP-SGD", network["swept"])
    budgets += _rows("network, last seen", network["last_seen"])
    worst = [
        _worst("convex, DP-SGD", convex["audit"], document["convex"]["epsilon_opacus"]),
        _worst("network, DP-SGD", network["swept"], document["epsilon_opacus"]),
    ]
    head = [f"Individual epsilon at delta {DELTA:g}: {document['instances']} digits, {STEPS} steps each"]
    artefacts, verdict = document["artefacts"], "VALID" if document["certificate"]["valid"] else "NOT VALID"
    notes = [
        f"Forget {made['requested']} digits from the convex model: {made['steps']} noisy fine-tuning steps "
        f"(training took {made['training_steps']}; {100 * made['cost_ratio']:.0f} % of retraining).",
        f"  Renyi divergence of order {made['order']:g} to retraining without them: "
        f"{rounded_up(made['value'])}, both directions, by {made['bound']}; "
        f"instance {made['deciding_id']} decides.",
        f"  certificate: {verdict} ({artefacts['certificate']})",
        f"  accuracy, mean of {accuracy['seeds']} seeds: original {accuracy['original']:.3f}, "
        f"unlearned {accuracy['unlearned']:.3f}, retrained without them {accuracy['retrained']:.3f} "
        "(then continued for as many steps, with the same noise: the certificate's reference)",
        f"SGLD, full batch: worst case {rounded_up(sgld['epsilon_worst'])}, median "
        f"{rounded_up(sgld['epsilon_quantiles']['0.5'])} ({sgld['basis']}); the same request takes "
        f"{sgld['plan']['steps']} steps by {sgld['plan']['bound']}.",
        f"Read the page, which opens offline in any browser: {artefacts['report']}",
        f"Audit it again: pia audit {artefacts['ledger']} --by digit",
        f"Check it again: pia verify {artefacts['certificate']} --ledger {artefacts['ledger']} "
        f"--checkpoint {artefacts['checkpoint']}",
        SENSITIVE,
    ]
    classes = [
        {
            "digit": row["group"],
            "instances": row["instances"],
            "median": row["median"],
            "max": row["max"],
            "basis": row["basis"],
        }
        for row in document["neural_network"]["by_digit"]
    ]
    top = [
        {"network's top spenders": row["id"], "epsilon": row["epsilon"], "basis": row["basis"]}
        for row in document["neural_network"]["top"]
    ]
    return Page(
        head=head,
        tables=[Table.of(table) for table in (worst, budgets, top, classes)],
        document=document,
        notes=notes,
    )
