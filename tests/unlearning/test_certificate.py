"""Certificates: what is issued, and that no edit, other evidence or broken run gets past verification."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import math
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

from per_instance_accountant.errors import CertificateError, PlanError, UsageError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import Disclosure, PublicStep, Resume
from per_instance_accountant.unlearning import (
    Certificate,
    generate_keys,
    issue,
    plan,
    request_status,
    save_envelope,
    sign,
    verify,
)
from per_instance_accountant.unlearning.canonical import digest_of
from per_instance_accountant.unlearning.certificate import seal_text


def before(model):
    """Another file beside ``model``: the weights that unlearning started from."""
    start = model.with_name(model.name + "-before")
    start.write_bytes(b"before " + model.read_bytes())
    return start


def leaves(node, path=()):
    """Paths of all leaves of a JSON tree, empty containers included."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    inner = [leaf for key, child in children for leaf in leaves(child, (*path, key))]
    return inner or [path]


def edited(content, path, value):
    changed = copy.deepcopy(content)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


def read(content, path):
    for key in path:
        content = content[key]
    return content


def alternatives(value):
    """Other values of the same type, as a forger would choose them, and values of other types."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int | float):
        return [
            value + 1,
            value * 0.5 if value else 0.25,
            value - 1,
            str(value),
        ]
    if isinstance(value, str):
        flipped = value[:-1] + ("0" if value[-1:] != "0" else "1")
        return [flipped, value + "x", "", 3]
    return [1.0, "x"] if value is None else [None]


def resealed(content, ledger=None):
    """A forger's recomputed digest and subject; with ``ledger`` even the owner's seal."""
    forged = copy.deepcopy(content)
    forged["digest"] = digest_of(forged["predicate"])
    after = forged["predicate"]["models"]["after"]
    forged["subject"][0]["digest"]["sha256"] = str(after).removeprefix("sha256:")
    if ledger is not None:
        forged["seal"] = ledger.pseudonym(seal_text(forged["digest"]))
    return forged


def test_a_finished_plan_is_certified_and_verifies(certified):
    _, made, certificate, path, _, after = certified
    report = verify(certificate, ledger=path, checkpoint=after)
    assert report.valid and not report.failures and len(report.checks) == 12
    report.raise_if_failed()
    predicate = certificate.predicate
    assert (predicate.steps, predicate.claim.value, predicate.bound) == (made.steps, made.value, made.bound)
    assert predicate.claim.adjacency == "zero-out" and predicate.claim.direction == "both"
    text = json.dumps(certificate.to_dict())
    assert certificate.to_dict()["_type"] == "https://in-toto.io/Statement/v1"
    assert str(path) not in text and all(len(r) == len("hmac-sha256:") + 64 for r in predicate.requests)


def test_file_round_trip_is_canonical_and_private(certified, tmp_path):
    _, _, certificate, path, _, after = certified
    file = tmp_path / "certificate.json"
    certificate.save(file)
    assert Certificate.load(file) == certificate and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert verify(str(file), ledger=Ledger.open(path), checkpoint=str(after)).valid
    assert verify(json.loads(file.read_bytes()), ledger=path, checkpoint=after).valid


def test_every_single_edit_is_refused(certified):
    """Each leaf, changed in several ways, plainly and with a new digest: the seal needs the ledger's key."""
    _, _, certificate, path, _, after = certified
    ledger, content = Ledger.open(path), certificate.to_dict()
    paths = leaves(content)
    assert len(paths) > 50
    for leaf in paths:
        for value in alternatives(read(content, leaf)):
            plain = edited(content, leaf, value)
            assert not verify(plain, ledger=ledger, checkpoint=after).valid, leaf
            if leaf[0] == "predicate":
                assert not verify(resealed(plain), ledger=ledger, checkpoint=after).valid, leaf


FREE = {"created", "software"}


def test_edits_by_the_owner_of_the_key_are_refused_by_the_evidence(certified):
    """With the seal redone only comments and claims that the evidence also supports may pass."""
    _, _, certificate, path, _, after = certified
    ledger, content = Ledger.open(path), certificate.to_dict()
    passed = set()
    for leaf in leaves(content["predicate"]):
        for value in alternatives(read(content["predicate"], leaf)):
            forged = resealed(edited(content, ("predicate", *leaf), value), ledger)
            if verify(forged, ledger=ledger, checkpoint=after).valid:
                passed.add(leaf[:2])
    # A weaker claim is true; a stated assumption is taken as stated; the facts of the ledger are compared.
    weaker = {("claim", "target"), ("claim", "order")}
    unchecked = {("models", "before")}
    stated = {leaf for leaf in passed if leaf[0] == "assumptions"}
    assert {leaf for leaf in passed if leaf[0] not in FREE} <= weaker | unchecked | stated
    assert ("claim", "value") not in passed and ("steps",) not in passed and ("bound",) not in passed


def test_fields_added_or_removed_are_refused(certified):
    _, _, certificate, path, _, after = certified
    content = certificate.to_dict()
    for leaf in leaves(content):
        removed = copy.deepcopy(content)
        node = read(removed, leaf[:-1])
        del node[leaf[-1]]
        assert not verify(removed, ledger=path, checkpoint=after).valid, leaf
    for holder in (content, content["predicate"], content["predicate"]["claim"]):
        holder["note"] = "trust me"
        assert not verify(content, ledger=path, checkpoint=after).valid
        del holder["note"]
    assert verify(content, ledger=path, checkpoint=after).valid


@pytest.mark.parametrize("missing", ["ledger", "checkpoint"])
def test_what_is_not_shown_is_not_established(certified, missing):
    _, _, certificate, path, _, after = certified
    evidence = {"ledger": path, "checkpoint": after}
    del evidence[missing]
    report = verify(certificate, **evidence)
    assert not report.valid and not report.failures
    assert any(check.status == "skipped" for check in report.checks)
    with pytest.raises(CertificateError, match="PIA050"):
        report.raise_if_failed()


def names(report):
    return {check.name for check in report.failures}


def test_another_model_is_refused(certified):
    _, _, certificate, path, before, _ = certified
    assert names(verify(certificate, ledger=path, checkpoint=before)) == {"checkpoint"}
    assert names(verify(certificate, ledger=path, checkpoint=before.parent / "nowhere")) == {"checkpoint"}


def test_another_or_rolled_back_ledger_is_refused(certified, course, tmp_path):
    run, made, certificate, path, _, after = certified
    other = course(tmp_path / "other", assumptions=run.ledger.run.assumptions).train(120)
    other.unlearn(dataclasses.replace(made, anchor=other.ledger.anchor))
    assert {"ledger", "requests", "seal"} <= names(verify(certificate, ledger=other.ledger, checkpoint=after))
    run.writer.close()
    rolled = tmp_path / "rolled"
    shutil.copytree(path, rolled)
    log = rolled / "events.log"
    with open(log, "r+b") as file:
        file.truncate(log.stat().st_size - 800)
    assert "ledger" in names(verify(certificate, ledger=rolled, checkpoint=after))
    with open(log, "r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    assert "ledger" in names(verify(certificate, ledger=rolled, checkpoint=after))


def test_a_ledger_that_went_on_still_verifies(certified):
    run, _, certificate, _, _, after = certified
    run.train(5)
    assert verify(certificate, ledger=run.ledger, checkpoint=after).valid


@pytest.fixture
def started(course, tmp_path):
    run = course(assumptions=course().known.to_dict()).train(60)
    made = plan(run.ledger, ids=[3, 17], target_epsilon=0.1, order=8)
    (tmp_path / "model").write_bytes(b"weights")
    return run, made, tmp_path / "model"


def fewer(run, made):
    run.unlearn(made, made.steps - 1)


def more(run, made):
    run.unlearn(made, made.steps + 1)


def louder(run, made):
    run.unlearn(made, noise_std=3.9)


def faster(run, made):
    run.unlearn(made, learning_rate=0.25)


def not_for_this_plan(run, made):
    run.unlearn(made, plan_digest="sha256:" + "0" * 64)


def as_training(run, made):
    run.unlearn(made, kind="train")


def nobody_forgotten(run, made):
    run.train(made.steps, kind="unlearn", plan_digest=made.digest)


def others_forgotten(run, made):
    run.forget([3, 18]).train(made.steps, kind="unlearn", plan_digest=made.digest)


def forgotten_late(run, made):
    run.train(1, kind="unlearn", plan_digest=made.digest).forget([3, 17]).step(made.steps - 1)


def training_went_on(run, made):
    run.step(1)
    run.unlearn(made)


def went_back(run, made):
    run.unlearn(made)
    run.writer.append(Resume(at_step=60 + made.steps - 2))


def two_mechanisms(run, made):
    run.unlearn(made, made.steps - 1)
    run.train(1, kind="unlearn", plan_digest=made.digest, weight_decay=0.1)


@pytest.mark.parametrize(
    "fault",
    [
        fewer,
        more,
        louder,
        faster,
        not_for_this_plan,
        as_training,
        nobody_forgotten,
        others_forgotten,
        forgotten_late,
        training_went_on,
        went_back,
        two_mechanisms,
    ],
)
def test_a_run_that_is_not_the_plan_gets_no_certificate(started, fault):
    run, made, model = started
    fault(run, made)
    with pytest.raises(PlanError, match="PIA033"):
        issue(made, run.ledger, before(model), model)


@pytest.mark.parametrize("target", [0.1, 50.0], ids=["some steps", "no step"])
@pytest.mark.parametrize(
    "event", [Disclosure(kind="histogram", epsilon=3.0), PublicStep(count=5)], ids=["published", "public"]
)
def test_what_came_between_plan_and_certificate_is_not_certified(course, tmp_path, target, event):
    """The plan charged no such statistic; after the certificate it is the owner's affair, as documented."""
    run = course(assumptions=course().known.to_dict()).train(60)
    made = plan(run.ledger, ids=[3], target_epsilon=target, order=8)
    assert (made.steps == 0) is (target == 50)
    model = tmp_path / "model"
    model.write_bytes(b"weights")
    run.writer.append(event)
    assert request_status(made, run.ledger) == "stale"
    run.unlearn(made)
    with pytest.raises(PlanError, match=r"PIA033.*after the plan"):
        issue(made, run.ledger, before(model), model)
    again = course(assumptions=course().known.to_dict()).train(60)
    made = plan(again.ledger, ids=[3], target_epsilon=target, order=8)
    certificate = issue(made, again.unlearn(made).ledger, before(model), model)
    if isinstance(event, Disclosure):
        again.writer.append(event)
        assert verify(certificate, ledger=again.ledger, checkpoint=model).valid


def test_a_noise_that_was_divided_and_multiplied_back_is_the_same(started):
    run, made, model = started
    run.unlearn(made, noise_std=float(np.nextafter(made.mechanism.noise_std, 0)))
    assert verify(issue(made, run.ledger, before(model), model), ledger=run.ledger, checkpoint=model).valid


def test_seeded_bug_one_step_too_few(started):
    """A planner that is off by one, with a run that follows it: the recomputed value is above the target."""
    run, made, model = started
    wrong = dataclasses.replace(made, steps=made.steps - 1)
    run.unlearn(wrong)
    with pytest.raises(CertificateError, match=r"PIA050.*value"):
        issue(wrong, run.ledger, before(model), model)


@pytest.mark.parametrize(
    "lie",
    [
        {"value": 0.01},
        {"bound": "R0 data processing"},
        {"bound": "R2 shifted LSI"},
        {"bound": "R9 wishful"},
        {"charging": "fixed_thresholds"},
        {"assumptions": {}},
        {"accounting_version": 3},
    ],
)
def test_a_plan_that_claims_more_than_the_ledger_supports_gets_no_certificate(started, lie):
    run, made, model = started
    wrong = dataclasses.replace(made, **lie)
    run.unlearn(wrong)
    with pytest.raises((CertificateError, PlanError)):
        issue(wrong, run.ledger, before(model), model)


def test_assumptions_said_to_be_of_the_run_must_stand_there(course, tmp_path):
    run = course(assumptions={"smoothness": 2.0, "clipping_never_binds": True}).train(60)
    made = plan(run.ledger, ids=[3], target_epsilon=0.1, order=8)
    wrong = dataclasses.replace(
        made, assumptions=made.assumptions | {"smoothness": {"value": 1.9, "source": "run"}}
    )
    run.unlearn(wrong)
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(CertificateError, match="assumptions"):
        issue(wrong, run.ledger, before(tmp_path / "m"), tmp_path / "m")


def test_unreachable_plans_and_missing_files_get_no_certificate(started, tmp_path):
    run, made, model = started
    run.unlearn(made)
    with pytest.raises(PlanError, match="PIA030"):
        issue(dataclasses.replace(made, steps=None, reachable=False), run.ledger, model, model)
    with pytest.raises(CertificateError, match="PIA051"):
        issue(made, run.ledger, model, tmp_path / "nothing")


def test_no_steps_are_needed_and_the_instances_are_excluded(course, tmp_path):
    run = course().train(3)
    made = plan(run.ledger, ids=[3], target_epsilon=50.0, order=8)
    assert made.steps == 0
    (tmp_path / "m").write_bytes(b"")
    with pytest.raises(PlanError, match="PIA033"):
        issue(made, run.ledger, before(tmp_path / "m"), tmp_path / "m")
    run.forget([3])
    certificate = issue(made, run.ledger, before(tmp_path / "m"), tmp_path / "m")
    assert verify(certificate, ledger=run.ledger, checkpoint=tmp_path / "m").valid


@pytest.mark.parametrize("measure", [{"order": 8}, {"target_delta": 1e-5}])
@pytest.mark.parametrize("direction", ["both", "remove"])
def test_every_measure_and_direction_round_trips(course, tmp_path, measure, direction):
    run = course(assumptions=course().known.to_dict()).train(40, sample_rate=0.03, noise_std=10.0)
    made = plan(
        run.ledger,
        ids=[3],
        target_epsilon=1e-3 if "order" in measure else 0.005,
        **measure,
        direction=direction,
    )
    run.unlearn(made)
    (tmp_path / "m").write_bytes(b"")
    certificate = issue(made, run.ledger, before(tmp_path / "m"), tmp_path / "m")
    assert made.steps > 0 and certificate.predicate.claim.direction == direction
    assert verify(certificate, ledger=run.ledger, checkpoint=tmp_path / "m").valid


def test_a_second_request_is_certified_after_the_first(certified, tmp_path):
    run, _, first, _, _, after = certified
    made = plan(run.ledger, ids=[5], target_epsilon=0.1, order=8)
    values = np.full(40, 1.5, np.float32)
    values[[3, 17, 5]] = 0
    run.thresholds(values, "forget").train(made.steps, kind="unlearn", plan_digest=made.digest)
    later = tmp_path / "later.pt"
    later.write_bytes(b"weights later")
    second = issue(made, run.ledger, after, later)
    assert verify(second, ledger=run.ledger, checkpoint=later).valid
    assert verify(first, ledger=run.ledger, checkpoint=after).valid


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"_type": NaN}', b"[" * 100_000])
def test_files_that_are_no_certificate_are_an_error(tmp_path, content):
    path = tmp_path / "certificate.json"
    path.write_bytes(content)
    for action in (Certificate.load, verify):
        with pytest.raises(CertificateError, match="PIA051"):
            action(path)
    with pytest.raises(CertificateError, match="PIA051"):
        verify(tmp_path / "missing.json")


def test_numbers_that_are_none_are_refused(certified):
    _, _, certificate, path, _, after = certified
    content = certificate.to_dict()
    for value in (math.nan, math.inf, -1.0, True):
        for field in ("value", "target", "order"):
            forged = edited(content, ("predicate", "claim", field), value)
            assert not verify(forged, ledger=path, checkpoint=after).valid


def test_verification_needs_neither_the_planner_nor_torch(certified, tmp_path):
    run, _, certificate, path, _, after = certified
    run.writer.close()
    certificate.save(tmp_path / "c.json")
    code = (
        "import sys, importlib.abc\n"
        "from per_instance_accountant.unlearning.verification import verify\n"
        f"report = verify({str(tmp_path / 'c.json')!r}, ledger={str(path)!r}, checkpoint={str(after)!r})\n"
        "print(report.valid, 'torch' in sys.modules, 'opacus' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]
    source = sys.modules["per_instance_accountant.unlearning.verification"].__file__
    with open(source) as file:
        assert "planner import" not in file.read()


@pytest.fixture
def keys(tmp_path):
    pytest.importorskip("cryptography")
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    generate_keys(private, public)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (private, public)} == {0o600}
    return private, public


def test_a_signature_verifies_and_stands_beside_the_certificate(certified, keys, tmp_path):
    _, _, certificate, path, _, after = certified
    envelope, file = sign(certificate, keys[0]), tmp_path / "certificate.dsse.json"
    save_envelope(envelope, file)
    evidence = {"ledger": path, "checkpoint": after, "public_key": keys[1], "require_signature": True}
    for given in (envelope, file, str(file)):
        report = verify(certificate, signature=given, **evidence)
        assert report.valid and [check.name for check in report.checks][-1] == "signature"
    assert sign(certificate, keys[0]) == envelope, "Ed25519 is deterministic"


def test_the_signature_is_that_of_the_dsse_standard(certified, keys):
    """Checked by the library alone, from the text of the standard."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    envelope = sign(certified[2], keys[0])
    payload = base64.b64decode(envelope["payload"])
    assert json.loads(payload) == certified[2].to_dict()
    message = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    load_pem_public_key(keys[1].read_bytes()).verify(
        base64.b64decode(envelope["signatures"][0]["sig"]), message
    )


def test_every_edit_of_the_envelope_or_the_certificate_breaks_the_signature(certified, keys):
    _, _, certificate, path, _, after = certified
    envelope, ledger = sign(certificate, keys[0]), Ledger.open(path)

    def outcome(content, signature):
        evidence = {"ledger": ledger, "checkpoint": after, "public_key": keys[1]}
        return verify(content, signature=signature, **evidence)

    for leaf in leaves(envelope):
        value = read(envelope, leaf)
        wrong = [
            *alternatives(value),
            value[:-2],
            "A" + value[1:] if value[0] != "A" else "B" + value[1:],
            None,
        ]
        for other in wrong:
            assert names(outcome(certificate, edited(envelope, leaf, other))) == {"signature"}, (leaf, other)
    for extra in ({**envelope, "note": 1}, {}, {**envelope, "signatures": envelope["signatures"] * 2}):
        assert names(outcome(certificate, extra)) == {"signature"}
    content = certificate.to_dict()
    for leaf in leaves(content["predicate"]):
        for value in alternatives(read(content["predicate"], leaf))[:2]:
            forged = resealed(edited(content, ("predicate", *leaf), value), ledger)
            assert not outcome(forged, envelope).valid, leaf


def test_a_required_signature_must_be_there_and_of_the_key(certified, keys, tmp_path):
    _, _, certificate, path, _, after = certified
    evidence = {"ledger": path, "checkpoint": after}
    assert names(verify(certificate, **evidence, require_signature=True)) == {"signature"}
    envelope = sign(certificate, keys[0])
    assert names(verify(certificate, **evidence, signature=envelope)) == {"signature"}
    other = tmp_path / "other.pem", tmp_path / "other.pub"
    generate_keys(*other)
    assert names(verify(certificate, **evidence, signature=envelope, public_key=other[1])) == {"signature"}
    stolen = sign(certificate, other[0])
    stolen["signatures"][0]["keyid"] = envelope["signatures"][0]["keyid"]
    assert names(verify(certificate, **evidence, signature=stolen, public_key=keys[1])) == {"signature"}
    with pytest.raises(UsageError, match="PIA071"):
        sign(certificate, keys[1])
    with pytest.raises(CertificateError, match="PIA051"):
        sign(certificate, tmp_path / "nowhere")
    report = verify(certificate, **evidence, signature=envelope, public_key=tmp_path / "nowhere")
    assert names(report) == {"signature"}


def test_the_certificate_states_its_conditions(certified):
    conditions = certified[2].to_dict()["predicate"]["conditions"]
    assert any("do not depend on a released model" in line for line in conditions)
    assert any("frozen parameters" in line for line in conditions)


def test_the_model_must_have_changed(course, tmp_path):
    run = course().train(60)
    made = plan(run.ledger, ids=[3], target_epsilon=0.1, order=8, assumptions=run.known)
    run.unlearn(made)
    model = tmp_path / "never-unlearned"
    model.write_bytes(b"weights")
    assert made.steps > 0
    with pytest.raises(CertificateError, match="same file"):
        issue(made, run.ledger, model, model)


def test_a_seed_stands_in_the_certificate(course, tmp_path):
    run = course().train(60)
    made = plan(run.ledger, ids=[3], target_epsilon=0.1, order=8, assumptions=run.known)
    run.unlearn(made)
    model = tmp_path / "model"
    model.write_bytes(b"weights")
    sources = {
        noise: issue(made, run.ledger, before(model), model, noise=noise) for noise in ("seed", "system")
    }
    assert {noise: c.predicate.noise for noise, c in sources.items()} == {"seed": "seed", "system": "system"}
