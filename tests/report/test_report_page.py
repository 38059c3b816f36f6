"""The page says what the data say, runs and loads nothing, and shows only what its reader may see."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import html.parser
import itertools
import math
import re
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant import LastSeen, WorstCase, audit
from per_instance_accountant.accounting import account
from per_instance_accountant.audit.budget import BudgetAudit
from per_instance_accountant.audit.release import release_histogram, release_quantiles
from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import Drop, Filter, Ledger, LedgerWriter, Phase, Run, Step, Thresholds
from per_instance_accountant.report import (
    BarrierEvidence,
    ClaimEvidence,
    Evidence,
    Released,
    report_html,
    sections,
    writing,
)
from per_instance_accountant.report.charts import Histogram, Lines, Ranges
from per_instance_accountant.report.drawing import spread
from per_instance_accountant.report.trajectories import trajectories
from per_instance_accountant.results.markup import plain
from per_instance_accountant.results.rounding import rounded_up
from per_instance_accountant.unlearning import plan_everyone
from tests.report.conftest import HOSTILE, STEPS, N, make_ledger

NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.UTC)
EVIDENCE = Evidence(
    barriers=(BarrierEvidence.of([[0.2, 0.3], [0.9, 0.5], [0.2, 0.3]], on="the forgotten instances"),),
    claims=(
        ClaimEvidence(name="worst case", claimed=3.0, lower=0.4, upper=1.2),
        ClaimEvidence(name="median", claimed=1.0, lower=0.1, upper=0.8),
    ),
)
ALLOWED = {"html", "head", "meta", "title", "style", "body", "a", "header", "footer", "main", "div", "strong"}
ALLOWED |= {"dl", "dt", "dd", "p", "ul", "li"}
ALLOWED |= {"h1", "h2", "h3", "figure", "figcaption", "svg", "line", "rect", "circle", "polyline", "text"}
ALLOWED |= {"details", "summary", "table", "caption", "thead", "tbody", "tr", "th", "td"}


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> _Tags:
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def breaches(page: str) -> list[str]:
    """What a page must not have: unknown elements, handlers, inline styles, addresses, loose policies."""
    tags, found = parsed(page).tags, []
    for name, attributes in tags:
        found += [name] if name not in ALLOWED else []
        found += [
            key for key in attributes if key == "style" or key.startswith("on") or key in ("src", "action")
        ]
        found += [value for key, value in attributes.items() if key == "href" and value != "#main"]
    style = page[page.index("<style>") + 7 : page.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(dict(a)["content"] for n, a in tags if n == "meta" and "http-equiv" in a)
    wanted = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    found += [] if policy == wanted else ["policy"]
    found += re.findall(r"url\(|@import|expression\(", style)
    return found


@pytest.fixture(scope="module")
def full(audited: BudgetAudit, source: Ledger) -> str:
    everyone = plan_everyone(source, 0.3, order=8)
    return report_html(audited, budget=0.5, everyone=everyone, evidence=EVIDENCE, created=NOON)


def test_the_page_runs_and_loads_nothing(full: str, audited: BudgetAudit) -> None:
    assert breaches(full) == []
    assert len(full.encode()) < 400_000
    assert breaches(report_html(audited, audience="shareable", by="label")) == []
    for seeded in (
        full.replace("<main", "<script>1</script><main", 1),
        full.replace('<p class="meta"', '<p onclick="x" class="meta"', 1),
        full.replace("<p>", '<p style="color:red">', 1),
        full.replace("--bg:#fff", "--bg:#eee", 1),
        full.replace('href="#main"', 'href="https://example.org"', 1),
    ):
        assert breaches(seeded) != []


def test_hostile_names_stay_text(full: str) -> None:
    assert "<script" not in full and "<img" not in full and "\u202e" not in full
    text = "".join(parsed(full).text)
    assert "<script>alert(1)</script>" in text and "\\u202eevil" in text


def test_the_numbers_are_those_of_the_audit(full: str, audited: BudgetAudit) -> None:
    text = "".join(parsed(full).text)
    median, most = audited.quantiles([0.5, 0.99]).tolist()
    for value in (audited.worst_case_tight, audited.worst_case, median, most):
        assert rounded_up(value) in text
    assert f"{audited.num_over(0.5)} of {N} are above the budget of 0.5" in text
    assert "2026-01-02 12:00 UTC" in text and audited.digest in text
    for line in audited.statement().splitlines():
        assert line in text


def test_the_page_is_deterministic(audited: BudgetAudit) -> None:
    assert report_html(audited, created=NOON) == report_html(audited, created=NOON)


def leaks(page: str, audited: BudgetAudit) -> list[str]:
    """Ids, or any number from individual values that is not a rounded mean of a large group."""
    text = "".join(parsed(page).text)
    # Shorter numbers also stand on axes.
    values = {value for value in map(rounded_up, audited.epsilon.tolist()) if len(value.strip("0.")) >= 4}
    public = {rounded_up(audited.worst_case), rounded_up(audited.worst_case_tight)}
    labels, sizes = np.unique(audited.groups["label"], return_counts=True)
    large = {
        f"{sections.two_digits_up(float(audited.epsilon[audited.groups['label'] == label].mean())):.4g}"
        for label, size in zip(labels, sizes, strict=True)
        if size >= sections.SMALLEST_GROUP
    }
    numbers = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text))
    small = [
        str(label) for label, size in zip(labels, sizes, strict=True) if size < 50 and str(label) in text
    ]
    return sorted(numbers & (values - public - large)) + re.findall(r"person-\d+", text) + small


def test_a_shareable_page_shows_no_individual(audited: BudgetAudit) -> None:
    for by in (None, "label", "person"):
        page = report_html(audited, audience="shareable", by=by, budget=0.5, evidence=EVIDENCE, created=NOON)
        assert leaks(page, audited) == []
        assert "above the budget" not in page
    assert "Groups by label" in report_html(audited, audience="shareable", by="label")
    assert "Groups by" not in report_html(audited, audience="shareable")
    internal = report_html(audited, created=NOON)
    assert leaks(internal, audited) != []


def test_a_small_group_is_hidden_and_seen_if_the_floor_falls(
    audited: BudgetAudit, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = HOSTILE[4]
    assert small not in report_html(audited, audience="shareable", by="label")
    monkeypatch.setattr(sections, "SMALLEST_GROUP", 1)
    assert small in report_html(audited, audience="shareable", by="label")


def test_means_of_groups_are_rounded_up_to_two_digits(audited: BudgetAudit) -> None:
    section = sections.group_means(audited, "label")
    assert section is not None and isinstance(section.chart, Ranges)
    for name, _, mean, _ in section.chart.rows:
        members = audited.epsilon[[plain(label) == name for label in audited.groups["label"]]]
        assert len(members) >= 50 and members.mean() <= mean <= members.mean() * 1.11


def test_the_histogram_counts_everybody_once(audited: BudgetAudit) -> None:
    chart = sections.epsilon_histogram(audited, None).chart
    assert isinstance(chart, Histogram) and sum(chart.counts) == N
    for low, high, count in zip(chart.edges[:-1], chart.edges[1:], chart.counts, strict=True):
        assert count == np.sum((audited.epsilon >= low) & (audited.epsilon < high))


@pytest.mark.parametrize("rule", [None, WorstCase(), LastSeen()])
def test_trajectories_end_at_the_epsilons_of_the_account(source: Ledger, rule: object) -> None:
    result = audit(source, charging=rule, tight=False)  # type: ignore[arg-type]
    name = None if rule is None else rule.name  # type: ignore[attr-defined]
    paths = trajectories(source, result.epsilon, result.delta, name)
    assert paths is not None and paths.steps[0] == 0 and paths.steps[-1] == STEPS
    curves = [paths.worst, *paths.quantiles.values()]
    assert all(a <= b for curve in curves for a, b in itertools.pairwise(curve))
    final = result.quantiles([0.1, 0.5, 0.9, 0.99])
    ends = np.array([curve[-1] for curve in paths.quantiles.values()])
    assert (ends >= final * (1 - 1e-9)).all() and (ends <= final * 1.01).all()
    assert paths.worst[-1] == pytest.approx(result.worst_case, rel=1e-6), "the table's number, to all digits"


def test_trajectories_follow_prefixes_of_the_run(source: Ledger) -> None:
    """At each stop the median is that of an account of a ledger that ends there."""
    paths = trajectories(source, account(source).epsilon(1e-5), 1e-5)
    assert paths is not None
    for place in (3, 11):
        shorter = make_ledger(steps=paths.steps[place])
        median = float(np.quantile(account(shorter).epsilon(1e-5), 0.5, method="higher"))
        assert median * (1 - 1e-9) <= paths.quantiles["p50"][place] <= median * 1.06


def test_followed_instances_stand_for_all() -> None:
    """Of 9,000 instances 4,096 are followed, and the quantiles are those of everybody."""
    ledger = make_ledger(size=9000, steps=3)
    result = audit(ledger, tight=False)
    paths = trajectories(ledger, result.epsilon, result.delta)
    assert paths is not None and paths.followed == 4096
    ends = np.array([curve[-1] for curve in paths.quantiles.values()])
    np.testing.assert_allclose(ends, result.quantiles([0.1, 0.5, 0.9, 0.99]), rtol=0.06)


def test_steps_to_unlearn_are_a_distribution(source: Ledger) -> None:
    everyone = plan_everyone(source, 0.3, order=8)
    section = sections.steps_to_unlearn(everyone)
    assert isinstance(section.chart, Lines)
    (_, shares), *_ = section.chart.series
    for steps, share in zip(section.chart.x, shares, strict=True):
        assert share == pytest.approx(100 * float(np.mean(everyone.steps <= steps)), rel=1e-12)
    assert f"half of the instances need at most {everyone.quantile([0.5])[0]:.0f} steps" in section.finding
    nobody = dataclasses.replace(everyone, steps=np.full(len(everyone.ids), math.inf))
    assert "cannot reach" in sections.steps_to_unlearn(nobody).finding
    assert breaches(report_html(audit(source), everyone=nobody)) == []


def test_a_refuted_claim_is_said_first() -> None:
    refuted = Evidence(claims=(ClaimEvidence(name="worst case", claimed=0.3, lower=0.4, upper=1.2),))
    section = sections.claimed_and_measured(refuted)
    assert section.chart.table()[1] == [("worst case", "0.4", "0.3", "1.2")]
    assert not section.ok and section.finding.startswith("1 of 1 claims are refuted")
    assert sections.claimed_and_measured(EVIDENCE).ok
    exact = Evidence(
        claims=tuple(ClaimEvidence(name=f"c{k}", claimed=c, lower=0.0) for k, c in enumerate((0.0, math.inf)))
    )
    assert "closest is c0, with at least 0 measured and at most 0 claimed" in (
        sections.claimed_and_measured(exact).finding
    )
    below = Evidence(claims=(ClaimEvidence(name="x", claimed=1.23456, lower=0.98765),))
    assert sections.claimed_and_measured(below).chart.table()[1] == [("x", "0.9876", "1.235", "not known")]


def test_a_barrier_is_measured_from_the_chord() -> None:
    (barrier,) = EVIDENCE.barriers
    assert "at most 0.45 nats above" in sections.loss_barrier(barrier).finding
    convex = BarrierEvidence.of([[1.0], [0.4], [0.2]], on="x", between="a and b")
    section = sections.loss_barrier(convex)
    assert section.title == "Loss barrier between a and b"
    assert "the mean loss on x never rises above" in section.finding


@pytest.mark.parametrize(
    "content",
    [
        {"claims": [{"name": "x", "claimed": float("nan"), "lower": 0, "upper": 1}]},
        {"claims": [{"name": "x", "claimed": 1.0, "lower": 2, "upper": 1}]},
        {"claims": [{"name": "x", "claimed": 1.0}]},
        {"barriers": [{"lowest": [1], "mean": [1], "highest": [1], "on": "x", "pairs": 1}]},
        {"confidence": 1.0},
        {"unknown": 1},
        [],
    ],
)
def test_evidence_that_says_nothing_is_refused(content: object) -> None:
    with pytest.raises(UsageError, match="PIA071"):
        Evidence.from_dict(content)  # type: ignore[arg-type]


def test_evidence_files(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    with pytest.raises(UsageError, match="PIA070"):
        Evidence.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="PIA070"):
        Evidence.load(path)
    path.write_text('{"claims": [{"name": "x", "claimed": 1.0, "lower": 0.0, "upper": 0.5}]}')
    assert Evidence.load(path).claims[0].holds


def test_pages_are_owner_only_and_whole(audited: BudgetAudit, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    path.chmod(0o644)
    audited.report(path, audience="internal")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    with pytest.raises(UsageError, match="PIA070"):
        audited.report(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "options", [{"audience": "public"}, {"budget": -1.0}, {"budget": math.nan}, {"by": "nothing"}]
)
def test_wrong_options_are_refused(audited: BudgetAudit, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        report_html(audited, **options)  # type: ignore[arg-type]


def test_every_basis_has_its_promise(source: Ledger) -> None:
    assert set(writing._PROMISE) == {"CERTIFIED", "OUTPUT_SPECIFIC", "ESTIMATE"}
    page = report_html(audit(source, charging=LastSeen()))
    assert "bound nothing" in page and "they rank instances" in page


def test_an_infinite_epsilon_is_counted_and_not_drawn(audited: BudgetAudit) -> None:
    epsilon = audited.epsilon.copy()
    epsilon[:3] = math.inf
    page = report_html(dataclasses.replace(audited, epsilon=epsilon, ledger=None))
    assert "3 instances without a finite bound are not drawn" in page and breaches(page) == []


def test_labels_never_touch() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        wanted = generator.uniform(10, 220, generator.integers(1, 7)).tolist()
        placed = spread(wanted, 14, 12, 216)
        order = np.argsort(wanted, kind="stable")
        assert (np.diff(np.array(placed)[order]) >= 14 - 1e-9).all()
        assert min(placed) >= 12 - 1e-9 and max(placed) <= 216 + 1e-9
    assert spread([20.0, 100.0], 14, 12, 216) == [20.0, 100.0]


def test_sixty_thousand_instances_take_little_more_than_their_fold() -> None:
    ledger = make_ledger(size=60_000, steps=60)
    result = audit(ledger, tight=False)
    before = time.process_time()
    page = report_html(result)
    assert time.process_time() - before < 5.0
    assert len(page.encode()) < 400_000


def released_for(ledger: Path) -> Released:
    return Released(
        histogram=release_histogram(ledger, 0.25), quantiles=release_quantiles(ledger, 0.25, [0.5])
    )


def test_released_statistics_are_paid_for_and_said(tmp_path: Path) -> None:
    before = audit(make_ledger(folder=tmp_path / "run"))
    released = released_for(tmp_path / "run")
    after = audit(tmp_path / "run")
    assert after.worst_case > before.worst_case
    page = report_html(after, audience="shareable", released=released)
    text = "".join(parsed(page).text)
    assert breaches(page) == [] and leaks(page, after) == []
    assert "differential privacy for epsilon 0.5" in text and rounded_up(after.worst_case_tight) in text
    assert "Published beside training: 2 statistics" in after.statement()
    assert "Published beside" not in before.statement()
    # The trajectories end with what was paid after the last step.
    paths = trajectories(Ledger.open(tmp_path / "run"), after.epsilon, after.delta)
    assert paths is not None and after.worst_case * (1 - 1e-9) <= paths.worst[-1] <= after.worst_case * 1.06


def test_whoever_left_pays_no_more_in_the_trajectories() -> None:
    """A run whose upper half left after ten of thirty steps ends where its audit ends."""
    writer = LedgerWriter.create(None, Run(num_instances=40))
    writer.append(Filter(family="renyi", orders=np.full(40, 8.0), budgets=np.full(40, 50.0)))
    writer.append(
        Phase(
            kind="train",
            sampling="poisson",
            sample_rate=0.1,
            noise_std=1.0,
            max_grad_norm=1.0,
            charging="fixed_thresholds",
            denominator=4.0,
            learning_rate=0.1,
        )
    )
    writer.append(Thresholds(values=np.linspace(0.1, 1, 40, dtype=np.float32), source="fixed"))
    for step in range(30):
        if step == 10:
            writer.append(Drop(positions=np.arange(20, 40)))
        writer.append(Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32)))
    ledger = writer.ledger()
    result = audit(ledger, tight=False)
    paths = trajectories(ledger, result.epsilon, result.delta, "fixed_thresholds")
    assert paths is not None
    ends = np.array([curve[-1] for curve in paths.quantiles.values()])
    final = result.quantiles([0.1, 0.5, 0.9, 0.99])
    assert (ends >= final * (1 - 1e-9)).all() and (ends <= final * 1.06).all()
    certified = audit(ledger).certified_budget
    assert certified is not None
    page = report_html(dataclasses.replace(result, certified_budget=certified * 0 + 0.75))
    assert '<dd class="value">0.75</dd>' in page and "CERTIFIED by the privacy filter" in page
    ignoring = audit(ledger, charging=WorstCase(), tight=False)
    charged = trajectories(ledger, ignoring.epsilon, ignoring.delta, "worst_case")
    assert charged is not None
    assert charged.quantiles["p10"][-1] == pytest.approx(charged.worst[-1], rel=1e-6)
    assert ends[-1] < 0.8 * charged.worst[-1]


@pytest.mark.parametrize("rule", [None, LastSeen(), WorstCase()])
def test_no_instance_is_shown_above_the_worst_case(source: Ledger, rule: object) -> None:
    """Renyi bounds stand beside a Renyi worst case, tight ones beside a tight one."""
    result = audit(source, charging=rule)  # type: ignore[arg-type]
    section = sections.epsilon_histogram(result, None)
    assert isinstance(section.chart, Histogram)
    worst = dict(section.chart.marks)[f"worst case {rounded_up(sections.comparable_worst(result))}"]
    assert result.epsilon.max() <= worst * (1 + 1e-12)
    if rule is not None and not isinstance(rule, WorstCase):
        assert result.worst_case_tight < result.epsilon.max(), "the tight one would be the wrong neighbour"


def test_a_budget_may_be_certified_although_scores_exceed_it(source: Ledger) -> None:
    result = audit(source, charging=LastSeen())
    budget = (result.worst_case_tight + float(result.epsilon.max())) / 2
    page = report_html(result, budget=budget)
    assert "CERTIFIED within it for everybody" in page and "certifies it for all" in page
    assert 'class="value bad"' not in page and 'class="value bad"' in report_html(result, budget=0.01)
