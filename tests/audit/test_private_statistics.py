"""Statistics of individual epsilons: what one row can change, what they cost, who is charged."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from per_instance_accountant import account, audit
from per_instance_accountant.accounting import account_groups
from per_instance_accountant.accounting.disclosures import disclosure_rdp
from per_instance_accountant.accounting.running import RunningLoss
from per_instance_accountant.audit import release
from per_instance_accountant.audit.release import individual_values, release_histogram, release_quantiles
from per_instance_accountant.errors import GuaranteeError, LedgerError, PiaError, UsageError
from per_instance_accountant.ledger import (
    Disclosure,
    Filter,
    Ledger,
    LedgerWriter,
    Phase,
    Run,
    Step,
    Thresholds,
)

N, DELTA = 40, 1e-5
NOBODY = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
UNIT = st.floats(min_value=0, max_value=1, width=32)


def make_phase(**changes: Any) -> Phase:
    settings = {
        "kind": "train",
        "sampling": "poisson",
        "sample_rate": 0.2,
        "noise_std": 1.0,
        "max_grad_norm": 1.0,
        "charging": "sweep",
        "denominator": 8.0,
        "learning_rate": 0.1,
    }
    return Phase(**(settings | changes))


def trained(path: Path | None, values: Any, steps: int = 50, **changes: Any) -> LedgerWriter:
    norms = np.asarray(values, np.float32)
    run = Run(num_instances=norms.size, groups={"pair": np.arange(norms.size) // 2})
    writer = LedgerWriter.create(path, run)
    writer.append(make_phase(**changes))
    writer.append(Thresholds(values=norms, source="sweep"))
    for _ in range(steps):
        writer.append(NOBODY)
    return writer


def on_disk(path: Path, values: Any = None, **changes: Any) -> Path:
    trained(path, np.linspace(0, 1, N) if values is None else values, **changes).close()
    return path


def changed_by_one_row(values: Callable[[Ledger], np.ndarray], norms: Any, row: int, norm: float) -> None:
    """The law: one row changes its own value only, and at most two counts by one."""
    other = np.array(norms, np.float32)
    other[row] = norm
    first, second = (values(trained(None, one, steps=3).ledger()) for one in (norms, other))
    others = np.arange(len(norms)) != row
    assert first[others].tobytes() == second[others].tobytes()
    edges = np.linspace(0, 3, 7)[1:-1]
    counts = [np.bincount(np.searchsorted(edges, one), minlength=6) for one in (first, second)]
    assert np.abs(counts[0] - counts[1]).sum() <= release.CHANGES


@settings(max_examples=40, deadline=None, derandomize=True)
@given(norms=st.lists(UNIT, min_size=2, max_size=30), place=st.integers(0, 99), norm=UNIT)
def test_one_row_changes_its_own_value_only(norms: list[float], place: int, norm: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "DEFAULT_ORDERS", (1.5, 4.0, 16.0, 63.0))
        changed_by_one_row(lambda ledger: individual_values(ledger, DELTA), norms, place % len(norms), norm)


def test_the_law_catches_values_on_the_scale_of_the_largest() -> None:
    def scaled(ledger: Ledger) -> np.ndarray:
        values = individual_values(ledger, DELTA)
        return np.asarray(values / values.max())

    with pytest.raises(AssertionError):
        changed_by_one_row(scaled, [0.1, 0.5, 1.0], 2, 0.9)


def test_values_are_the_bounds_of_the_account() -> None:
    ledger = trained(None, np.linspace(0, 1, N)).ledger()
    values = individual_values(ledger, DELTA)
    assert np.allclose(values, account(ledger).epsilon(DELTA), rtol=1e-12, atol=0)
    assert (values >= audit(ledger, DELTA).epsilon * (1 - 1e-12)).all()


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("order", [1.1, 2.0, 8.0, 300.0])
def test_the_charge_is_above_randomised_response(epsilon: float, order: float) -> None:
    with mpmath.workdps(40):
        high = mpmath.exp(epsilon) / (1 + mpmath.exp(epsilon))
        low, a = 1 - high, mpmath.mpf(order)
        exact = mpmath.log(high**a * low ** (1 - a) + low**a * high ** (1 - a)) / (a - 1)
        assert disclosure_rdp(epsilon, np.array([order]))[0] >= exact


def test_the_charge_catches_half_of_it() -> None:
    with mpmath.workdps(40):
        high = mpmath.exp(0.01) / (1 + mpmath.exp(0.01))
        exact = mpmath.log(high**2 / (1 - high) + (1 - high) ** 2 / high)
        assert disclosure_rdp(0.01, np.array([2.0]))[0] / 2 < exact


def test_everybody_is_charged_wherever_losses_are_computed() -> None:
    writer = trained(None, np.linspace(0, 1, N))
    before, pairs = account(writer.ledger()), account_groups(writer.ledger(), "pair", orders=[4.0])
    running = RunningLoss.of(writer.ledger())
    event = Disclosure(kind="histogram", epsilon=0.5)
    writer.append(event)
    running.take(event)
    after = account(writer.ledger())
    cost = disclosure_rdp(0.5, before.orders)
    assert np.allclose(after.rdp - before.rdp, cost, rtol=1e-9)
    assert np.allclose(after.worst_case_rdp - before.worst_case_rdp, cost, rtol=1e-9)
    assert after.spans is None and after.mu is None
    assert (audit(writer.ledger(), DELTA).epsilon > before.epsilon(DELTA)).all()
    # Row 0 owed nothing before, for which no conversion is needed.
    assert (after.epsilon(DELTA) <= before.epsilon(DELTA) + 0.5 + 1e-9)[1:].all()
    together = account_groups(writer.ledger(), "pair", orders=[4.0])
    assert np.allclose(together.rdp - pairs.rdp, min(1.0, 4.0 / 2), rtol=1e-9)
    assert np.allclose(running.epsilons(DELTA), RunningLoss.of(writer.ledger()).epsilons(DELTA), rtol=1e-12)
    assert (running.epsilons(DELTA) >= after.epsilon(DELTA) * (1 - 1e-9)).all()


@pytest.mark.parametrize("family", ["renyi", "gaussian"])
def test_budgets_of_a_filter_grow_or_promise_nothing(family: str) -> None:
    writer = LedgerWriter.create(None, Run(num_instances=2))
    orders = np.full(2, 4.0 if family == "renyi" else 2.0)
    writer.append(Filter(family=family, orders=orders, budgets=np.array([1.0, 2.0])))
    writer.append(make_phase(charging="worst_case", sample_rate=1.0, noise_std=20.0))
    writer.append(NOBODY)
    writer.append(Disclosure(kind="quantiles", epsilon=0.1))
    promised = account(writer.ledger()).certified_budget
    if family == "gaussian":
        assert promised is None
    else:
        assert promised is not None
        assert np.allclose(promised.budgets, [1.02, 2.02], rtol=1e-9)


def test_a_histogram_is_charged_recorded_and_near_the_truth(tmp_path: Path) -> None:
    path = on_disk(tmp_path / "run", np.linspace(0, 1, 4000))
    truth = individual_values(Ledger.open(path), DELTA)
    published = release_histogram(path, 1.0, edges=[0, 0.5, 1.0, 2.0, 4.0])
    counts = np.histogram(truth, [0, 0.5, 1.0, 2.0, np.inf])[0]
    # A count is off by 60 with probability below 1e-12.
    assert np.abs(np.array(published.counts) - counts).max() < 60
    assert published.edges == (0, 0.5, 1.0, 2.0, 4.0)
    entries = [event for event in Ledger.open(path).events() if isinstance(event, Disclosure)]
    assert [(e.kind, e.epsilon) for e in entries] == [("histogram", 1.0)]
    again = release_histogram(path, 0.5)
    assert len(again.counts) == 40 and again.edges[0] == 0
    assert len([e for e in Ledger.open(path).events() if isinstance(e, Disclosure)]) == 2


def test_quantiles_of_three_thousand(tmp_path: Path) -> None:
    norms = np.random.default_rng(0).beta(2, 3, size=3000)
    path = on_disk(tmp_path / "run", norms)
    truth = individual_values(Ledger.open(path), DELTA)
    published = release_quantiles(path, 0.5)
    shares = [(truth <= value).mean() for value in published.values]
    assert np.abs(np.array(shares) - published.quantiles).max() < 0.08
    assert list(published.values) == sorted(published.values)
    assert Ledger.open(path).num_steps == 50
    entries = [event for event in Ledger.open(path).events() if isinstance(event, Disclosure)]
    assert [(e.kind, e.epsilon) for e in entries] == [("quantiles", 0.5)]


def test_the_noise_has_its_law() -> None:
    """Discrete Laplace of scale 2 / epsilon: a two-sided geometric law, compared by chi-square."""
    dp = release._opendp()
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l1_distance(T=int)
    mechanism = release._within(lambda scale: dp.m.make_laplace(*space, scale=scale), 1.0)
    assert 0.999 < mechanism.map(release.CHANGES) <= 1.0
    draws = np.array(mechanism([0] * 20_000))
    ratio = math.exp(-1 / 2)
    support = np.arange(-8, 9)
    law = (1 - ratio) / (1 + ratio) * ratio ** np.abs(support)
    observed = [(draws == k).sum() for k in support]
    tail = len(draws) - sum(observed)
    expected = np.append(law, 1 - law.sum()) * len(draws)
    assert stats.chisquare([*observed, tail], expected).pvalue > 1e-6
    halved = np.append(
        wrong := (1 - ratio**2) / (1 + ratio**2) * ratio ** (2 * np.abs(support)), 1 - wrong.sum()
    )
    assert stats.chisquare([*observed, tail], halved * len(draws)).pvalue < 1e-12


def test_a_statistic_knows_which_copy_of_a_ledger_charges_it(tmp_path: Path) -> None:
    original = on_disk(tmp_path / "original")
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    published = [release_histogram(copy, 0.1), release_quantiles(copy, 0.1, [0.5])]
    assert all(Ledger.open(copy).holds(statistic.anchor) for statistic in published)
    assert not any(Ledger.open(original).holds(statistic.anchor) for statistic in published)
    # Not even if the original publishes as much itself.
    own = release_histogram(original, 0.1)
    assert Ledger.open(original).holds(own.anchor) and not Ledger.open(copy).holds(own.anchor)
    assert not any(Ledger.open(original).holds(statistic.anchor) for statistic in published)


def test_nothing_is_published_uncharged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = on_disk(tmp_path / "run")
    holder = LedgerWriter.resume(path)
    with pytest.raises(LedgerError, match="PIA044"):
        release_histogram(path, 0.1)
    holder.close()

    class Broken:
        def map(self, changes: int) -> float:
            return 0.0

        def __call__(self, counts: Any) -> Any:
            entries = [event for event in Ledger.open(path).events() if isinstance(event, Disclosure)]
            assert len(entries) == 1
            raise KeyboardInterrupt

    monkeypatch.setattr(release, "_within", lambda make, epsilon: Broken())
    with pytest.raises(KeyboardInterrupt):
        release_histogram(path, 0.1)
    assert isinstance(list(Ledger.open(path).events())[-1], Disclosure)


@pytest.mark.parametrize(
    ("changes", "options", "code"),
    [
        ({"charging": "unamplified"}, {}, "PIA118"),
        ({"charging": "last_seen"}, {}, "PIA118"),
        ({"sampling": "shuffled"}, {}, "PIA118"),
        ({"steps": 0}, {}, "PIA118"),
        ({"noise_std": 0.0}, {}, "PIA070"),
        ({}, {"epsilon": 0}, "PIA070"),
        ({}, {"epsilon": math.nan}, "PIA070"),
        ({}, {"epsilon": 11.0}, "PIA070"),
        ({}, {"epsilon": True}, "PIA070"),
        ({}, {"delta": 0.0}, "PIA070"),
        ({}, {"edges": [0.0]}, "PIA070"),
        ({}, {"edges": [1.0, 0.5]}, "PIA070"),
        ({}, {"edges": [0.0, math.nan]}, "PIA070"),
        ({}, {"edges": [0.0, math.inf]}, "PIA070"),
        ({}, {"edges": [-1.0, 1.0]}, "PIA070"),
    ],
)
def test_what_cannot_be_supported_is_refused_and_not_charged(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], code: str
) -> None:
    path = on_disk(tmp_path / "run", **changes)
    with pytest.raises(PiaError) as caught:
        release_histogram(path, **({"epsilon": 0.1} | options))
    assert caught.value.code == code
    with pytest.raises((GuaranteeError, UsageError)):
        release_quantiles(path, quantiles=[] if code == "PIA070" else [0.5], epsilon=0.1)
    assert not [event for event in Ledger.open(path).events() if isinstance(event, Disclosure)]
