"""Deletion requests, plans, runs and certificates that cannot be what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from per_instance_accountant import audit, plan, verify
from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.unlearning import issue
from tests.bad_inputs.cases import refused
from tests.unlearning.conftest import Course

TARGET = {"target_epsilon": 0.1, "order": 8}


def trained(path: Path | None = None, **changes: Any) -> Course:
    known = Course(None).known
    return Course(path, assumptions=known.to_dict()).train(120, **changes)


def nobody_to_forget() -> None:
    refused(lambda: plan(trained().ledger, ids=[], **TARGET), "PIA032")


def everybody_to_forget() -> None:
    refused(lambda: plan(trained().ledger, ids=list(range(40)), **TARGET), "PIA032")


def an_instance_named_twice() -> None:
    refused(lambda: plan(trained().ledger, ids=[3, 3], **TARGET), "PIA032")


def an_unknown_instance() -> None:
    error = refused(lambda: plan(trained().ledger, ids=[774411], **TARGET), "PIA032")
    assert "774411" not in str(error)


def forgotten_before() -> None:
    """Excluded, but nothing was unlearned: it needs what anybody needs."""
    run = trained().forget([3])
    assert plan(run.ledger, ids=[3], **TARGET).steps == plan(trained().ledger, ids=[3], **TARGET).steps > 0


def an_instance_without_loss() -> None:
    thresholds = np.ones(40)
    thresholds[5] = 0
    known = Course(None).known
    run = Course(None, assumptions=known.to_dict()).thresholds(thresholds)
    run = run.train(120, charging="fixed_thresholds")
    made = plan(run.ledger, ids=[5], **TARGET)
    assert (made.steps, made.value) == (0, 0)


def many_to_forget() -> None:
    ledger = trained().ledger
    few, more = (plan(ledger, ids=list(range(count)), **TARGET) for count in (1, 8))
    assert more.steps > few.steps


def a_target_out_of_reach() -> None:
    made = plan(trained(weight_decay=0.0).ledger, ids=[3], target_epsilon=1e-9, order=8)
    assert not made.reachable and made.value > 1e-9


def targets_that_are_none() -> None:
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(PiaError):
            plan(trained().ledger, ids=[3], target_epsilon=target, order=8)
    for order in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(PiaError):
            plan(trained().ledger, ids=[3], target_epsilon=1.0, order=order)
    for delta in (0.0, 1.0, math.nan, -1e-5):
        with pytest.raises(PiaError):
            plan(trained().ledger, ids=[3], target_epsilon=1.0, target_delta=delta)


def a_map_that_expands() -> None:
    """A learning rate beyond 2 / smoothness: no bound that contracts may be used."""
    made = plan(trained(learning_rate=1e3).ledger, ids=[3], **TARGET)
    assert not made.reachable


def no_noise_in_training() -> None:
    made = plan(trained(noise_std=0.0).ledger, ids=[3], **TARGET)
    assert not made.reachable
    refused(lambda: issue(made, trained().ledger, __file__, __file__), "PIA030")


def finished(folder: Path) -> tuple[Any, ...]:
    run = trained(folder / "run")
    made = plan(run.ledger, ids=[3, 17], **TARGET)
    before, after = folder / "before.pt", folder / "after.pt"
    before.write_bytes(b"weights before")
    after.write_bytes(b"weights after")
    run.unlearn(made)
    return run, made, before, after


def one_step_too_few(folder: Path) -> None:
    run, made, before, after = (*finished(folder),)
    short = trained(folder / "short")
    plan_of_short = plan(short.ledger, ids=[3, 17], **TARGET)
    short.unlearn(plan_of_short, steps=plan_of_short.steps - 1)
    refused(lambda: issue(plan_of_short, short.ledger, before, after), "PIA033")
    assert issue(made, run.ledger, before, after)


def less_noise_than_planned(folder: Path) -> None:
    _, _, before, after = finished(folder)
    quiet = trained(folder / "quiet")
    made = plan(quiet.ledger, ids=[3, 17], **TARGET)
    quiet.unlearn(made, noise_std=made.mechanism.noise_std * 0.99)
    refused(lambda: issue(made, quiet.ledger, before, after), "PIA033")


def another_model(folder: Path) -> None:
    run, made, before, after = finished(folder)
    certificate = issue(made, run.ledger, before, after)
    assert verify(certificate, ledger=run.ledger, checkpoint=after).valid
    after.write_bytes(b"other weights")
    report = verify(certificate, ledger=run.ledger, checkpoint=after)
    assert not report.valid and report.failures


def an_edited_certificate(folder: Path) -> None:
    run, made, before, after = finished(folder)
    certificate = issue(made, run.ledger, before, after)
    path = folder / "certificate.json"
    certificate.save(path)
    text = path.read_text()
    for old, new in (('"_type', '"_tipe'), (text[:-40], ""), (text, "null"), (text, "[" * 100_000)):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(PiaError) as caught:
            verify(path, ledger=run.ledger, checkpoint=after).raise_if_failed()
        assert caught.value.code in ("PIA050", "PIA051")
        path.write_text(text)


def a_ledger_rolled_back(folder: Path) -> None:
    run, made, before, after = finished(folder)
    certificate = issue(made, run.ledger, before, after)
    run.writer.close()
    log = folder / "run" / "events.log"
    log.write_bytes(log.read_bytes()[:-200])
    report = verify(certificate, ledger=Ledger.open(folder / "run"), checkpoint=after)
    assert not report.valid


def the_ledger_of_another_run(folder: Path) -> None:
    run, made, before, after = finished(folder)
    certificate = issue(made, run.ledger, before, after)
    other = trained(folder / "other")
    assert not verify(certificate, ledger=other.ledger, checkpoint=after).valid


def a_certificate_holds_no_individual_value(folder: Path) -> None:
    """One value for the whole request, and pseudonyms in the place of ids."""
    run, made, before, after = finished(folder)
    path = folder / "certificate.json"
    issue(made, run.ledger, before, after).save(path)
    content = json.loads(path.read_text())
    text = json.dumps(content)
    assert text.count("hmac-sha256:") >= 2 and '"ids"' not in text
    assert path.stat().st_mode & 0o077 == 0


def versions_are_stated(folder: Path) -> None:
    run, made, before, after = finished(folder)
    path = folder / "certificate.json"
    issue(made, run.ledger, before, after).save(path)
    from per_instance_accountant import __version__

    assert __version__ in path.read_text()


def a_budget_is_not_passed_by_an_estimate() -> None:
    run = Course(None).train(120, charging="last_seen")
    result = audit(run.ledger)
    assert result.basis == "ESTIMATE" and "bounds nothing" in result.statement()
    refused(lambda: plan(run.ledger, ids=[3], **TARGET), "PIA012")


def a_plan_of_another_moment() -> None:
    run = trained()
    made = plan(run.ledger, ids=[3], **TARGET)
    edited = [replace(made, steps=made.steps - 1), replace(made, value=made.value / 2)]
    for plan_ in edited:
        assert plan_.digest != made.digest


ALONE: dict[str, tuple[str, Callable[[], Any]]] = {
    "a request for nobody": ("refused", nobody_to_forget),
    "a request for everybody": ("refused", everybody_to_forget),
    "an instance named twice": ("refused", an_instance_named_twice),
    "an unknown instance": ("refused without its name", an_unknown_instance),
    "an instance that was only excluded": ("steps as for anybody", forgotten_before),
    "an instance that never contributed": ("no steps", an_instance_without_loss),
    "a large request": ("charged as a group", many_to_forget),
    "a target out of reach": ("unreachable, with the best value", a_target_out_of_reach),
    "targets that are none": ("refused", targets_that_are_none),
    "a learning rate that expands": ("unreachable", a_map_that_expands),
    "training without noise": ("no certificate", no_noise_in_training),
    "an estimate as evidence": ("refused", a_budget_is_not_passed_by_an_estimate),
    "an edited plan": ("another digest", a_plan_of_another_moment),
}
ON_DISK: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "one step too few": ("no certificate", one_step_too_few),
    "less noise than planned": ("no certificate", less_noise_than_planned),
    "another model": ("not valid", another_model),
    "a certificate edited, cut or hostile": ("refused or not valid", an_edited_certificate),
    "a ledger rolled back": ("not valid", a_ledger_rolled_back),
    "the ledger of another run": ("not valid", the_ledger_of_another_run),
    "a certificate in public": ("no value of one person", a_certificate_holds_no_individual_value),
    "versions": ("stated", versions_are_stated),
}


@pytest.mark.parametrize("name", ALONE)
def test_requests(name: str) -> None:
    ALONE[name][1]()


@pytest.mark.parametrize("name", ON_DISK)
def test_certificates(name: str, tmp_path: Path) -> None:
    ON_DISK[name][1](tmp_path)
