"""Known defects of other privacy accountants, found again by the laws of ``per_instance_accountant.testing``.

Each row names a library, a law or component check, and what is known to be wrong. The script asks the law and
reports the smallest input it found; the same laws are asked of this package. ``--write`` puts the table, with
the versions that were tested, into docs/verification.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import Figure, report
from benchmarks.tables import markdown, put
from per_instance_accountant.testing import CHECKS, Report, watch_checks
from per_instance_accountant.testing.components import (
    ComponentFault,
    check_loading_runs_no_code,
    check_neighbours_release_alike,
    check_ranks_draw_apart,
)
from per_instance_accountant.testing.peers import versions

ROOT = Path(__file__).resolve().parents[1]
PEERS = "per_instance_accountant.testing.peers"
OURS = "per_instance_accountant.testing.accountants"


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """What is wrong in ``peer``, the law that shows it, and where it was reported, if it was."""

    peer: str
    law: str
    wrong: str
    source: str = ""


def _defect(peer: str, law: str, wrong: str, source: str = "") -> Defect:
    return Defect(peer=peer, law=law, wrong=wrong, source=source)


KNOWN: Final[tuple[Defect, ...]] = (
    _defect("OpacusRDP", "any_orders_are_sound", "negative epsilon for fine orders", "opacus 585"),
    _defect("OpacusRDP", "rdp_is_not_below_the_exact_value", "negative divergence at fractional orders"),
    _defect("OpacusRDP", "rdp_is_a_number", "NaN at integer orders from 1030 on"),
    _defect("OpacusRDP", "extreme_epsilon_is_never_wrong", "no answer for noise 1e6 at rate 0.5"),
    _defect("OpacusRDP", "impossible_input_is_refused", "endless loop for a noise that is NaN"),
    _defect("OpacusRDP", "states_are_not_shared", "loaded states are shared, not copied"),
    _defect("OpacusRDP", "an_impossible_state_is_refused", "edited state accepted"),
    _defect("OpacusRDP", "a_missing_history_is_refused", "state without history gives epsilon 0"),
    _defect("OpacusRDP", "steps_are_counted", "len() counts changes of the noise, not steps"),
    _defect("OpacusRDP", "impossible_targets_are_refused", "a noise for the target NaN"),
    _defect("OpacusPRV", "impossible_input_is_refused", "endless loop for a noise that is NaN"),
    _defect("OpacusPRV", "states_are_not_shared", "loaded states are shared, not copied"),
    _defect("OpacusGDP", "one_step_is_not_below_the_exact_step", "epsilon too small after one step"),
    _defect("OpacusGDP", "a_run_is_not_below_a_lower_bound", "epsilon too small after 200 steps"),
    _defect("OpacusGDP", "impossible_input_is_refused", "NaN gives epsilon 0"),
    _defect("OpacusGDP", "a_change_of_noise_is_counted_or_refused", "a refused step erases the history"),
    _defect("DpAccountingRDP", "impossible_input_is_refused", "NaN gives epsilon 0"),
    _defect("DpAccountingRDP", "rdp_is_close_to_the_exact_value", "divergence thousands of times too large"),
    _defect("DpAccountingRDP", "rdp_rises_with_the_order", "infinite at an order, finite above it"),
    _defect(
        "DpAccountingRDPReplaceOne",
        "full_batch_is_not_below_the_exact_gaussian",
        "a replaced instance is charged as a removed one",
        "differential-privacy 378",
    ),
    _defect(
        "DpAccountingPLD",
        "full_batch_is_not_below_the_exact_gaussian",
        "epsilon too small by rounding at rate 1",
    ),
)
"""Defects of the pinned versions that a law finds."""


def _opacus_scales(size: int) -> dict[str, float]:
    _, optimizer, loader = _private(size)
    return {"denominator": float(optimizer.expected_batch_size), "sample rate": float(loader.sample_rate)}


def _private(size: int) -> Any:
    import torch
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    module = torch.nn.Linear(2, 2)
    return PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.zeros(size, 2)), batch_size=10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )


def _opacus_masks() -> None:
    """Two ranks that were seeded alike, as a script that calls torch.manual_seed at its top does."""
    import numpy as np
    import torch
    from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler

    masks = []
    for rank in range(2):
        torch.manual_seed(0)
        sampler = DistributedUniformWithReplacementSampler.__new__(DistributedUniformWithReplacementSampler)
        sampler.total_size, sampler.sample_rate, sampler.generator = 200, 0.2, None
        sampler.num_replicas, sampler.rank, sampler.epoch, sampler.shuffle = 2, rank, 0, False
        sampler.num_samples, sampler.num_batches, sampler.steps = 100, 50, 50
        drawn = np.zeros((50, 200), dtype=bool)
        for step, batch in enumerate(list(sampler)[:50]):
            drawn[step, list(batch)] = True
        masks.append(drawn[:, rank::2].ravel())
    check_ranks_draw_apart(np.stack(masks))


def _load_checkpoint(path: Path) -> None:
    from opacus import PrivacyEngine

    module, optimizer, _ = _private(20)
    PrivacyEngine().load_checkpoint(path=str(path), module=module, optimizer=optimizer)


COMPONENTS: Final[tuple[tuple[Defect, Callable[[], None]], ...]] = (
    (
        _defect("Opacus", "loading_runs_no_code", "load_checkpoint runs code of the file"),
        lambda: check_loading_runs_no_code(_load_checkpoint),
    ),
    (
        _defect("Opacus", "neighbours_release_alike", "the denominator counts the data", "opacus 571, 819"),
        lambda: check_neighbours_release_alike(_opacus_scales, 99),
    ),
    (
        _defect("Opacus", "ranks_draw_apart", "ranks of one seed draw alike"),
        _opacus_masks,
    ),
)
"""Defects of parts, and the check that finds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Whether the defect was found. smallest: input, what: happened there, examples: tried until then."""

    defect: Defect
    found: bool
    examples: int = 1
    smallest: str = ""
    what: str = ""


def look(examples: int | None, seconds: float) -> list[Finding]:
    """Ask every law of the peer that is known to break it."""
    findings = []
    for peer in dict.fromkeys(defect.peer for defect in KNOWN):
        mine = [defect for defect in KNOWN if defect.peer == peer]
        judged = watch_checks(
            f"{PEERS}:{peer}", laws=[d.law for d in mine], examples=examples, seconds=seconds
        )
        for defect, verdict in zip(mine, _in_order(judged, mine), strict=True):
            findings.append(
                Finding(
                    defect=defect,
                    found=verdict.status == "broken",
                    examples=verdict.examples,
                    smallest=verdict.smallest or "",
                    what=verdict.what or "",
                )
            )
    return findings + [_component(defect, check) for defect, check in COMPONENTS]


def _in_order(judged: Report, mine: list[Defect]) -> list[Any]:
    verdicts = {verdict.law: verdict for verdict in judged.verdicts}
    return [verdicts[defect.law] for defect in mine]


def _component(defect: Defect, check: Callable[[], None]) -> Finding:
    try:
        check()
    except ComponentFault as fault:
        return Finding(defect=defect, found=True, what=str(fault))
    return Finding(defect=defect, found=False)


def judge_ours(examples: int | None, seconds: float) -> list[Report]:
    """All laws, asked of this package's accountants."""
    references = [f"{OURS}:RenyiAccountant", f"{PEERS}:OpacusPerInstance"]
    references += [f"{OURS}:{name}" for name in ("TightAccountant", "LedgerAccountant")]
    return [watch_checks(reference, examples=examples, seconds=seconds) for reference in references]


def table(findings: list[Finding], ours: list[Report]) -> str:
    """Markdown: what was tested, the defects, and the verdict on this package."""
    tested = ", ".join(f"{name} {number}" for name, number in versions().items())
    rows = [
        (
            f"`{f.defect.peer}`",
            f.defect.wrong + (f" ({f.defect.source})" if f.defect.source else ""),
            f"`{f.defect.law}`",
            _short(f.smallest) or "",
            _short(f.what),
        )
        for f in findings
        if f.found
    ]
    own = [
        (f"`{r.accountant}`", len(r.ran), r.examples, len(r.broken), len(r.verdicts) - len(r.ran))
        for r in ours
    ]
    return (
        f"Tested: {tested}; {len(CHECKS)} laws. {len(rows)} of {len(findings)} known defects were found.\n\n"
        + markdown(("accountant", "what is wrong", "law or check", "smallest input", "what happened"), rows)
        + "\n\nThe same laws, asked of this package:\n\n"
        + markdown(("accountant", "laws run", "examples", "broken", "not applicable"), own)
    )


def _short(text: str) -> str:
    """At most 160 characters; numbers and orders in the middle are left out."""
    return text if len(text) <= 160 else f"{text[:110]} ... {text[-40:]}"


def main() -> int:
    """Run, print, write; exit code 1 if a known defect was not found or this package breaks a law."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--quick", action="store_true", help="few examples, under 60 s")
    parser.add_argument("--write", action="store_true", help="put the table into docs/verification.md")
    options = parser.parse_args()
    examples = 2 if options.quick else None
    findings = look(25 if options.quick else None, 1.0 if options.quick else 3.0)
    ours = judge_ours(examples, 20.0)
    figures = {
        "defects_found": Figure(value=sum(f.found for f in findings), target=len(findings), at_least=True),
        "laws_broken_by_this_package": Figure(value=sum(len(r.broken) for r in ours), target=0),
        "laws_run_on_this_package": Figure(value=sum(len(r.ran) for r in ours), target=60, at_least=True),
        "examples_on_this_package": Figure(value=sum(r.examples for r in ours)),
    }
    report("peer_defects", figures, options.format)
    for finding in findings:
        if not finding.found:
            print(f"not found: {finding.defect.peer} {finding.defect.law}", file=sys.stderr)
    for judged in ours:
        for verdict in judged.broken:
            print(f"broken: {judged.accountant} {verdict.law}: {verdict.smallest}", file=sys.stderr)
    if options.write:
        put(ROOT / "docs" / "verification.md", "peer-defects", table(findings, ours))
    return 0 if all(figure.as_dict()["holds"] is not False for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
