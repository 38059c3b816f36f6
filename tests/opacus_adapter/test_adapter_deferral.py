"""Contributions that come later than their steps: the same ledger, no step that waits, nothing uncharged.

There is no accelerator here, so the CPU is declared to be one, and copies arrive as late as a test says.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal

import numpy as np
import opacus
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant import FixedThresholds, PrivacyFilter, Sweep, account
from per_instance_accountant.accounting.rules import LastSeen, Unamplified, WorstCase
from per_instance_accountant.errors import AlignmentError, LedgerError, UsageError
from per_instance_accountant.ledger import (
    Ledger,
    LedgerWriter,
    Phase,
    Run,
    Step,
    merge_parts,
    new_run_id,
    promises,
)
from per_instance_accountant.opacus_adapter import PrivacyEngine, deferring
from per_instance_accountant.opacus_adapter.clipping import (
    clip_factors,
    clip_on_device,
    layer_factors,
    layer_factors_on_device,
)

WAITING = ("cpu", "item", "tolist", "__bool__", "__float__", "__int__", "nonzero")


class LateCopy(deferring.Copy):
    """Arrives when it was asked for ``delay`` times, or when somebody waits for it."""

    delay, taken = 2, 0

    def arrived(self):
        self.delay -= 1
        return self.delay <= 0

    def take(self):
        type(self).taken += 1
        return super().take()


@pytest.fixture
def later(monkeypatch):
    """later(training) -> training, whose contributions come later from now on."""
    monkeypatch.setattr(deferring, "FLUSH_STEPS", 3)
    monkeypatch.setattr(LateCopy, "taken", 0)

    def change(training):
        deferral = training.engine.tracker.recorder.deferral
        deferral.devices, deferral.copy = frozenset({"cpu"}), LateCopy
        return training

    return change


def facts(ledger):
    """All events, arrays by their bytes."""
    found = []
    for event in ledger.events():
        names = getattr(type(event), "__slots__", ())
        values = [getattr(event, name) for name in names]
        found.append(
            (type(event).__name__, *(v.tobytes() if isinstance(v, np.ndarray) else v for v in values))
        )
    return found


LAYERS = [0.3, 0.4, 0.3, 0.5]
THRESHOLDS = FixedThresholds(thresholds=np.linspace(0.01, 1.5, 97))
CASES = {
    **{mode: {"mode": mode} for mode in ("hooks", "functorch", "ew", "ghost")},
    "parts": {"limit": 5},
    "ghost in parts": {"mode": "ghost", "limit": 5},
    "sum": {"reduction": "sum"},
    "layers": {"max_grad_norm": LAYERS, "clipping": "per_layer", "limit": 5},
    "shuffled": {"poisson_sampling": False, "charging": Unamplified()},
    "thresholds": {"charging": THRESHOLDS, "limit": 5},
    "ghost thresholds": {"mode": "ghost", "charging": THRESHOLDS},
    "layers thresholds": {"max_grad_norm": LAYERS, "clipping": "per_layer", "charging": THRESHOLDS},
    "sweep": {"charging": Sweep(every=4)},
    "last seen": {"charging": LastSeen()},
    "filter": {"charging": Sweep(every=4), "filter": PrivacyFilter(budget=0.3, order=4.0)},
    "empty batches": {"batch_size": 1},
}


def trained(start, case, change=lambda training: training, *, odometer=True, ledger=None):
    options = dict(CASES[case])
    limit = options.pop("limit", None)
    engine = PrivacyEngine(
        accountant="rdp", ledger=ledger, **{k: options.pop(k) for k in ("charging", "filter") if k in options}
    )
    training = change(start(engine, **options))
    if odometer:
        engine.metrics(1e-5)
    for epoch in range(2):
        # A new learning rate is a fact of its own between the steps.
        training.optimizer.param_groups[0]["lr"] = 0.05 / (epoch + 1)
        training.train(limit=limit)
    return training


@pytest.mark.compat
@pytest.mark.parametrize("case", CASES)
def test_the_ledger_is_the_same_bit_for_bit(start, later, case):
    now, after = trained(start, case), trained(start, case, later)
    assert facts(after.engine.ledger) == facts(now.engine.ledger)
    assert torch.equal(after.weights, now.weights)
    assert after.engine.metrics(1e-5) == now.engine.metrics(1e-5)
    assert LateCopy.taken > 2


def test_a_learning_rate_for_every_step(start, later):
    found = []
    for change in (lambda training: training, later):
        training = change(start())
        for number, batch in enumerate(training.loader):
            training.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
            training.step(batch)
        found.append(facts(training.engine.ledger))
    assert found[0] == found[1]
    assert LateCopy.taken > 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 1e30) | st.floats(0, 3), min_size=1, max_size=30),
    st.floats(1e-6, 1e6),
    st.integers(0, 2**31),
)
def test_clipping_where_the_norms_are_gives_the_same_bits(values, limit, seed):
    norms = np.array(values)
    limits = limit * np.random.default_rng(seed).random(len(norms))
    factors, contributions = clip_on_device(torch.from_numpy(norms), torch.from_numpy(limits))
    expected = clip_factors(norms, limits)
    assert factors.numpy().tobytes() == expected[0].tobytes()
    assert contributions.numpy().tobytes() == expected[1].tobytes()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_layers_where_the_norms_are(seed, layers):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(5, 300 + i, generator=generator) * 10 ** (i - 3) for i in range(layers)]
    limits = np.random.default_rng(seed).random(layers)
    factors, together = layer_factors_on_device(rows, limits)
    expected = layer_factors(rows, limits)
    np.testing.assert_allclose(factors.numpy(), expected[0], rtol=2e-7)
    np.testing.assert_allclose(together.numpy(), expected[1], rtol=1e-15)
    exact = [row.double().norm(dim=1).numpy() * own for row, own in zip(rows, factors.numpy().T, strict=True)]
    assert (together.numpy() >= np.linalg.norm(exact, axis=0)).all()


def waits_of_steps(training, monkeypatch, count):
    batches = iter(training.loader)
    training.step(next(batches))
    counts = dict.fromkeys(WAITING, 0)
    for _ in range(count):
        batch = next(batches)  # The sampler works on the host.
        with monkeypatch.context() as patched:
            count_waits(patched, counts)
            training.step(batch)
    return counts


def count_waits(patched, counts):
    for name in WAITING:
        method = getattr(torch.Tensor, name)

        def call(tensor, *arguments, _name=name, _method=method, **named):
            counts[_name] += 1
            return _method(tensor, *arguments, **named)

        patched.setattr(torch.Tensor, name, call)


@pytest.mark.parametrize("case", ["hooks", "functorch", "ew", "ghost", "thresholds", "layers"])
def test_no_step_waits_for_the_device(start, later, monkeypatch, case):
    options = {name: value for name, value in CASES[case].items() if name not in ("limit", "charging")}
    engine = PrivacyEngine(accountant="rdp", charging=CASES[case].get("charging"))
    ours = waits_of_steps(later(start(engine, **options)), monkeypatch, 5)
    theirs = waits_of_steps(start(opacus.PrivacyEngine(accountant="rdp"), **options), monkeypatch, 5)
    assert all(ours[name] <= theirs[name] for name in WAITING), (ours, theirs)
    assert case == "ew" or not sum(ours.values()), ours  # Of a step of expanded weights itself.
    assert LateCopy.taken <= 2


def test_seeded_bug_a_step_that_looks_at_its_norms_is_caught(start, later, monkeypatch):
    clip = deferring.Deferral.clip

    def curious(self, norms, positions, limits):
        assert bool(norms.isfinite().all())
        return clip(self, norms, positions, limits)

    monkeypatch.setattr(deferring.Deferral, "clip", curious)
    counts = waits_of_steps(later(start()), monkeypatch, 3)
    assert counts["__bool__"] >= 3


def killed_while_training(start, later, path, monkeypatch, steps):
    """A process that dies without warning after so many steps, none of whose copies arrived."""
    monkeypatch.setattr(LateCopy, "delay", 1 << 30)
    monkeypatch.setattr(deferring, "FLUSH_STEPS", 3)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            training = later(start(PrivacyEngine(accountant="rdp", ledger=path)))
            for number, batch in enumerate(training.loader):
                training.step(batch)
                os.write(write_end, b".")
                if number + 1 == steps:
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as acknowledged:
        assert len(acknowledged.read()) == steps
    os.waitpid(child, 0)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_a_killed_process_loses_no_step(start, later, tmp_path, monkeypatch, steps):
    killed_while_training(start, later, tmp_path / "a", monkeypatch, steps)
    expected = start(PrivacyEngine(accountant="rdp"))
    for _, batch in zip(range(steps), expected.loader, strict=False):
        expected.step(batch)
    truth = expected.steps
    ledger = Ledger.open(tmp_path / "a")
    left = [event for event in ledger.events() if isinstance(event, Step)]
    assert len(left) == ledger.num_steps == steps
    for mine, true in zip(left, truth, strict=True):
        assert np.array_equal(mine.positions, true.positions)
        assert (mine.contributions >= true.contributions).all()
    worst = account(expected.engine.ledger, charging=WorstCase(), orders=[2, 8]).rdp
    assert (account(ledger, charging=WorstCase(), orders=[2, 8]).rdp == worst).all()
    loose = account(ledger, charging=Unamplified(), orders=[2, 8]).rdp
    assert (loose >= account(expected.engine.ledger, charging=Unamplified(), orders=[2, 8]).rdp).all()
    # Whoever goes on has the same facts, and what was promised stays charged.
    with LedgerWriter.resume(tmp_path / "a") as writer:
        assert facts(writer.ledger())[: len(facts(ledger))] == facts(ledger)
    assert sorted(os.listdir(tmp_path / "a")) == ["events.log", "key"]
    assert Ledger.open(tmp_path / "a").num_steps == steps


def test_seeded_bug_a_release_before_its_promise_loses_steps(start, later, tmp_path, monkeypatch):
    monkeypatch.setattr(deferring, "FLUSH_STEPS", 1 << 20)

    def forgetful(self, event):
        self._walk.progress.apply(event)
        return self._walk.sequence + 1

    monkeypatch.setattr(LedgerWriter, "promise", forgetful)
    killed_while_training(start, later, tmp_path / "a", monkeypatch, 5)
    assert Ledger.open(tmp_path / "a").num_steps < 5


def test_others_see_a_running_training_charged_as_promised(start, later, tmp_path):
    training = later(start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "a")))
    for count, batch in enumerate(training.loader, 1):
        training.step(batch)
        assert Ledger.open(tmp_path / "a").num_steps == count
        assert not training.engine.tracker.recorder.deferral.idle
    assert training.engine.tracker.recorder.deferral.idle  # the end of a pass waits
    assert facts(Ledger.open(tmp_path / "a")) == facts(training.engine.ledger)


@pytest.mark.parametrize("way", ["checkpoint", "close", "ledger", "flush", "metrics", "epoch"])
def test_what_looks_at_the_ledger_waits(start, later, tmp_path, way):
    training = later(start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "a")))
    engine, deferral = training.engine, training.engine.tracker.recorder.deferral
    batches = iter(training.loader)
    training.step(next(batches))
    assert not deferral.idle
    {
        "checkpoint": lambda: engine.save_checkpoint(path=tmp_path / "m.pt", module=training.model),
        "close": engine.close,
        "ledger": lambda: engine.ledger,
        "flush": engine.tracker.recorder.flush,
        "metrics": lambda: engine.metrics(1e-5),
        "epoch": lambda: iter(training.loader),
    }[way]()
    assert deferral.idle
    expected = start()
    expected.step(next(iter(expected.loader)))
    assert facts(Ledger.open(tmp_path / "a")) == facts(expected.engine.ledger)


def test_a_checkpoint_taken_between_resumes_and_charges_what_came_after(start, later, tmp_path):
    first = later(start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "a")))
    batches = iter(first.loader)
    for _ in range(4):
        first.step(next(batches))
    first.engine.save_checkpoint(path=tmp_path / "m.pt", module=first.model, optimizer=first.optimizer)
    for _ in range(2):
        first.step(next(batches))
    first.engine.tracker.recorder._writer._log.close()  # as a killed process
    second = later(start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "a"), seed=7))
    second.engine.load_checkpoint(path=tmp_path / "m.pt", module=second.model, optimizer=second.optimizer)
    assert second.engine.ledger.num_steps == 6
    assert second.engine.ledger.abandoned == ((4, 6),)
    second.train()
    second.engine.close()
    assert Ledger.open(tmp_path / "a").num_steps == 6 + len(second.loader)


POISON = {"hooks": {}, "ghost": {"mode": "ghost"}, "layers": CASES["layers"] | {"mode": "hooks"}}


@pytest.mark.parametrize("case", POISON)
def test_a_gradient_that_is_not_finite_releases_nothing(start, later, case):
    options = {name: value for name, value in POISON[case].items() if name != "limit"}
    training = later(start(**options))
    batches = iter(training.loader)
    for _ in range(2):
        training.step(next(batches))
    before, taken = training.weights.clone(), 2
    x, y = next(batches)
    x = x.clone()
    x[0, 0] = float("nan")
    code = None
    try:
        for batch in itertools.chain([(x, y)], batches):
            training.step(batch)
            taken += 1
    except AlignmentError as error:
        code = error.code
    assert code == "PIA006"
    assert 3 <= taken <= 2 + 3 * deferring.FLUSH_STEPS
    assert torch.equal(training.weights, before)
    # Nothing but abandon() goes on, and from the parameters before the bad step.
    with pytest.raises(AlignmentError, match=r"PIA00[26]"):
        training.engine.save_checkpoint(path="never.pt", module=training.model)
    training.engine.abandon()
    assert training.engine.ledger.num_steps == taken
    training.train()
    assert not torch.equal(training.weights, before)
    assert torch.isfinite(training.weights).all()
    after = training.steps[-1]
    assert np.isfinite(after.contributions).all()


def test_seeded_bug_a_release_that_is_not_made_void_is_caught(start, later, monkeypatch):
    monkeypatch.setattr(deferring.Deferral, "void", lambda self, parameters: None)
    with pytest.raises(AssertionError):
        test_a_gradient_that_is_not_finite_releases_nothing(start, later, "hooks")


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ({"charging": Unamplified(), "filter": PrivacyFilter(budget=3.0, order=4.0)}, {}),
        ({"verify": "every_step"}, {}),
        (
            {},
            {
                "clipping": "adaptive",
                "target_unclipped_quantile": 0.5,
                "clipbound_learning_rate": 0.2,
                "max_clipbound": 3.0,
                "min_clipbound": 0.05,
                "unclipped_num_std": 2.0,
            },
        ),
    ],
)
def test_steps_whose_norms_decide_something_are_not_deferred(start, later, engine, options):
    training = later(start(PrivacyEngine(accountant="rdp", **engine), **options))
    for batch in training.loader:
        training.step(batch)
        assert training.engine.tracker.recorder.deferral.idle


def test_a_first_step_that_is_verified_is_not_deferred_and_the_others_are(start, later):
    training = later(start(PrivacyEngine(accountant="rdp", verify="first_step")))
    found = []
    for batch in training.loader:
        training.step(batch)
        found.append(training.engine.tracker.recorder.deferral.idle)
    assert found == [True] + [False] * (len(found) - 1)


PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=0.5,
    noise_std=1.0,
    max_grad_norm=1.0,
    charging="worst_case",
    denominator=2.0,
    learning_rate=0.1,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_promises_and_facts_in_any_order_are_what_was_said(tmp_path_factory, data):
    """A model of the writer: what is read is every fact once, measured where it was fulfilled before another
    kind of fact followed, and promised otherwise; whoever reads, and whenever."""
    path = tmp_path_factory.mktemp("ledger") / "a"
    writer, model, open_promises = LedgerWriter.create(path, Run(num_instances=4)), [], []

    def step(value):
        return Step(positions=np.arange(3), contributions=np.full(3, value, np.float32))

    writer.append(PHASE)
    for number in range(1, data.draw(st.integers(2, 13))):
        action = data.draw(st.sampled_from(["promise", "phase", "fulfil", "append", "flush", "kill"]))
        if action == "promise":
            open_promises.append((writer.promise(step(1.0)), len(model), number))
            model.append(1.0)
        elif action == "phase":
            writer.promise(PHASE)
        elif action == "fulfil" and open_promises:
            count = data.draw(st.integers(1, len(open_promises)))
            due, open_promises = open_promises[:count], open_promises[count:]
            writer.fulfil([(n, np.full(3, k / 100, np.float32)) for n, _, k in due])
            for _, place, k in due:
                model[place] = k / 100
        elif action == "append":
            writer.append(step(number / 100))
            model.append(number / 100)
            open_promises = []
        elif action == "flush":
            writer.flush()
            open_promises = []
        elif action == "kill":
            writer._log.close()
            writer._promises._log = None
            writer = LedgerWriter.resume(path)
            writer.append(PHASE)
            open_promises = []
        read = [e for e in Ledger.open(path).events() if isinstance(e, Step)]
        assert [float(e.contributions[0]) for e in read] == [float(np.float32(v)) for v in model]
    writer.close()
    assert Ledger.open(path).num_steps == len(model)
    assert sorted(os.listdir(path)) == ["events.log", "key"]


def test_more_than_was_promised_is_refused_and_the_promise_stays(tmp_path):
    writer = LedgerWriter.create(tmp_path / "a", Run(num_instances=4))
    writer.append(PHASE)
    bound = Step(positions=np.arange(2), contributions=np.full(2, 0.5, np.float32))
    number = writer.promise(bound)
    for wrong in ([0.6, 0.1], [-0.1, 0.1], [np.nan, 0.1], [0.1]):
        with pytest.raises(UsageError, match="PIA070"):
            writer.fulfil([(number, np.array(wrong, np.float32))])
    writer.close()
    steps = [event for event in Ledger.open(tmp_path / "a").events() if isinstance(event, Step)]
    assert [step.contributions.tolist() for step in steps] == [[0.5, 0.5]]


def test_merging_takes_promises_as_they_stand(tmp_path):
    identity, writers = new_run_id(), []
    for rank in range(2):
        run = Run(num_instances=4, run_id=identity, rank=rank, world_size=2)
        writers.append(LedgerWriter.create(tmp_path / f"rank-{rank}", run))
        writers[-1].append(PHASE)
        writers[-1].promise(Step(positions=np.array([rank]), contributions=np.full(1, 0.5, np.float32)))
    merged = merge_parts([tmp_path / "rank-0", tmp_path / "rank-1"], None)
    (step,) = (event for event in merged.events() if isinstance(event, Step))
    assert (step.positions.tolist(), step.contributions.tolist()) == ([0, 1], [0.5, 0.5])


def test_every_cut_of_the_promises_leaves_whole_ones_and_every_flip_is_refused(tmp_path):
    writer = LedgerWriter.create(tmp_path / "a", Run(num_instances=4))
    writer.append(PHASE)
    for value in (0.25, 0.5):
        writer.promise(Step(positions=np.arange(2), contributions=np.full(2, value, np.float32)))
    writer._log.close()
    file = tmp_path / "a" / "promises.log"
    whole = file.read_bytes()
    counts = []
    for end in range(len(whole) + 1):
        file.write_bytes(whole[:end])
        counts.append(Ledger.open(tmp_path / "a").num_steps)
    assert counts == [0] * (len(whole) // 2) + [1] * (len(whole) // 2) + [2]
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        file.write_bytes(changed)
        with pytest.raises(Exception, match=r"PIA04[23]"):
            Ledger.open(tmp_path / "a")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["written", "clear", "add"])
def test_an_interrupt_anywhere_doubles_and_loses_no_step(start, later, tmp_path, monkeypatch, place, when):
    training = later(start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "a")))
    method, calls, weights = getattr(promises.Promises, place), itertools.count(1), [training.weights.clone()]

    def interrupted(self, *arguments, **named):
        third = next(calls) == (2 if place == "clear" else 3)
        if not third or when == "after":
            method(self, *arguments, **named)
        if third:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(promises.Promises, place, interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            for batch in training.loader:
                training.step(batch)
                weights.append(training.weights.clone())
    assert next(calls) > 2 and torch.equal(training.weights, weights[-1])
    with contextlib.suppress(LedgerError):  # A writer that was interrupted while it wrote goes no further.
        training.engine.abandon()
        training.engine.close()
    ledger, released = Ledger.open(tmp_path / "a"), len(weights) - 1
    assert released <= ledger.num_steps <= released + 1
    expected = start()
    for _, batch in zip(range(released), expected.loader, strict=False):
        expected.step(batch)
    steps = [event for event in ledger.events() if isinstance(event, Step)]
    for mine, true in zip(steps, expected.steps, strict=False):
        assert np.array_equal(mine.positions, true.positions)
        assert (mine.contributions >= true.contributions).all()
