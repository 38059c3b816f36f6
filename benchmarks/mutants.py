"""Seeded privacy bugs: one wrong line each, the file it is put into, and the tests that must notice it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

_D, _A, _L = "divergence", "accounting", "ledger"
_U, _O = "unlearning", "opacus_adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """``old`` stands exactly once in ``path`` and is replaced by ``new``. area: what it breaks.

    tests: files or folders below tests/ whose run must fail then.
    """

    name: str
    area: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


def _mutant(area: str, name: str, path: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name=name, area=area, path=path, old=old, new=new, tests=tests)


def _accounting(name: str, path: str, old: str, new: str, *tests: str) -> Mutant:
    return _mutant("accounting", name, path, old, new, *tests)


def _ledger(name: str, path: str, old: str, new: str, *tests: str) -> Mutant:
    return _mutant("ledger", name, f"{_L}/{path}", old, new, *tests)


def _capture(name: str, path: str, old: str, new: str, *tests: str) -> Mutant:
    return _mutant("capture", name, f"{_O}/{path}", old, new, *tests)


def _planner(name: str, path: str, old: str, new: str, *tests: str) -> Mutant:
    return _mutant("planner", name, f"{_U}/{path}", old, new, *tests)


def _certificate(name: str, path: str, old: str, new: str) -> Mutant:
    return _mutant("certificate", name, f"{_U}/{path}", old, new, "unlearning/test_certificate.py")


_RDP = "divergence/test_sampled_gaussian.py"
_FOLD = "accounting/test_fold.py"
_FACTS = ("ledger/test_ledger_facts.py", "ledger/test_ledger_course.py")
_STORAGE = ("ledger/test_ledger_storage.py", "ledger/test_ledger_damage.py")
_CLIPPING = ("opacus_adapter/test_adapter_clipping.py", "opacus_adapter/test_adapter_stock.py")
_ALIGNMENT = ("opacus_adapter/test_adapter_alignment.py", "opacus_adapter/test_adapter_guards.py")

MUTANTS: Final[tuple[Mutant, ...]] = (
    _accounting(
        "Renyi divergence rounded down by 1e-8",
        f"{_D}/sampled_gaussian.py",
        "grid) * (1 + INFLATION)",
        "grid) * (1 - 1e-8)",
        _RDP,
    ),
    _accounting(
        "sample rate taken 10 % too small",
        f"{_D}/sampled_gaussian.py",
        "_two_kernels(max(rate, _SMALLEST_RATE)",
        "_two_kernels(max(rate / 1.1, _SMALLEST_RATE)",
        _RDP,
    ),
    _accounting(
        "sign of log(order) flipped in the conversion",
        f"{_D}/conversions.py",
        "-(np.log(probability) + np.log(grid)) / (grid - 1)",
        "-(np.log(probability) + 2 * np.log(grid)) / (grid - 1)",
        "divergence/test_conversions.py",
    ),
    _accounting(
        "exact epsilon rounded to the lower end of its interval",
        f"{_D}/gaussian.py",
        "bound = kept * (high + kept / 2) + ROUNDING",
        "bound = kept * (low - 1e-9 + kept / 2) - ROUNDING",
        "divergence/test_gaussian.py",
    ),
    _accounting(
        "curve extrapolated beyond the largest order",
        f"{_D}/orders.py",
        "result = np.where(targets > grid[-1], np.inf, result)",
        "result = np.where(targets > grid[-1], curve[..., -1:], result)",
        "divergence/test_conversions.py",
    ),
    _accounting(
        "run counted once per level instead of once per step",
        f"{_D}/tight.py",
        "np.sqrt(self.counts @ (self.ratios**2))",
        "np.sqrt((self.counts > 0) @ (self.ratios**2))",
        "divergence/test_tight.py",
    ),
    _accounting(
        "sensitivity rounded down to the node of the grid",
        f"{_A}/chords.py",
        "values = np.stack([steps * (1 - weight), steps * weight], axis=1)",
        "values = np.stack([steps * (1 - weight), 0 * steps * weight], axis=1)",
        _FOLD,
    ),
    _accounting(
        "amplification by sampling for shuffled batches",
        f"{_L}/records.py",
        'return self.sample_rate if self.sampling == "poisson" else 1.0',
        "return self.sample_rate",
        _FOLD,
        "accounting/test_other_mechanisms.py",
    ),
    _accounting(
        "steps with an empty draw are free",
        f"{_A}/fold.py",
        "                self.seen[positions] = self.bound[positions] = contributions\n"
        "        self.step += 1",
        "                self.seen[positions] = self.bound[positions] = contributions\n"
        "        self.step += int(step.positions.size > 0)",
        _FOLD,
    ),
    _accounting(
        "a threshold of 0 in a sweep forgets the instance for good",
        f"{_A}/fold.py",
        'if thresholds.source == "forget":',
        "if True:",
        _FOLD,
        "accounting/test_statements.py",
        "end_to_end/test_brute_force.py",
    ),
    _accounting(
        "instances drawn twice in a release are charged once",
        f"{_A}/fold.py",
        "if repeats <= 1:",
        "if repeats <= 9:",
        _FOLD,
        "accounting/test_other_mechanisms.py",
    ),
    _accounting(
        "realised sum of a sweep called certified",
        f"{_A}/rules.py",
        'name: ClassVar[str] = "sweep"\n    basis: ClassVar[Basis] = Basis.OUTPUT_SPECIFIC',
        'name: ClassVar[str] = "sweep"\n    basis: ClassVar[Basis] = Basis.CERTIFIED',
        _FOLD,
        "accounting/test_statements.py",
    ),
    _accounting(
        "filter looks at the past only, so it is one step late",
        f"{_A}/spending.py",
        "over = (self._sums(self._steps) + charge) * _SLACK > self.filter.budgets",
        "over = self._sums(self._steps) * _SLACK > self.filter.budgets",
        "accounting/test_filter_law.py",
    ),
    _accounting(
        "running totals rounded down",
        f"{_A}/odometer.py",
        "(_UNITS << _FINE) + (1 << _FINE) - 1 - int(_FIRST)",
        "(_UNITS << _FINE) - int(_FIRST)",
        "accounting/test_odometer.py",
    ),
    _ledger(
        "rolled-back ledger accepted on resume",
        "writer.py",
        "if anchor is not None and not ledger.holds(anchor):",
        "if False and anchor is not None and not ledger.holds(anchor):",
        *_STORAGE,
        *_FACTS,
    ),
    _ledger(
        "no mark where a resume went back",
        "writer.py",
        "                writer.append(Resume(at_step=at_step, session=session))",
        "                pass",
        *_STORAGE,
        *_FACTS,
    ),
    _ledger(
        "bytes not compared with the seal",
        "sealing.py",
        "if digest.upto(seal.end) != DIGEST_PREFIX + seal.digest.hex():",
        "if digest.upto(seal.end) is None:",
        "ledger/test_ledger_sealing.py",
    ),
    _ledger(
        "sessions of ranks told apart by their number",
        "parts.py",
        "        starts.append((session, before[session]))",
        "        starts.append((None, len(starts)))",
        "ledger/test_merge_law.py",
    ),
    _ledger(
        "chain value not compared",
        "frames.py",
        "if trailer[_CHECK.size : -len(END)] != chain:",
        "if False:",
        "ledger/test_ledger_damage.py",
    ),
    _ledger(
        "payload checksum not compared, chain neither",
        "frames.py",
        '        return "the payload checksum differs", chain\n'
        "    if trailer[_CHECK.size : -len(END)] != chain:",
        "        pass\n    if False:",
        "ledger/test_ledger_damage.py",
    ),
    _ledger(
        "forgotten instances may be drawn again",
        "progress.py",
        "if self._forgotten is not None and bool(self._forgotten[positions].any()):",
        "if False and self._forgotten is not None:",
        *_FACTS,
    ),
    _ledger(
        "thresholds called fixed after training began",
        "progress.py",
        "late = self._fixed is None and self.num_steps > 0",
        "late = False",
        *_FACTS,
    ),
    _ledger(
        "mechanism of an abandoned branch stays in force",
        "progress.py",
        "self._phase_stale |= self._phase_at >= start",
        "self._phase_stale |= False",
        *_FACTS,
    ),
    _ledger(
        "a step may go back over a contribution that is NaN",
        "progress.py",
        "if not (contributions.min() >= 0 and contributions.max() < math.inf):",
        "if contributions.min() < 0 or contributions.max() == math.inf:",
        *_FACTS,
    ),
    _capture(
        "gradients clipped at 1.01 times the clip norm",
        "clipping.py",
        "exact = np.minimum(1.0, limits / (norms + STOCK_MARGIN))",
        "exact = np.minimum(1.0, 1.01 * limits / (norms + STOCK_MARGIN))",
        *_CLIPPING,
    ),
    _capture(
        "recorded contributions 5 % too small",
        "clipping.py",
        "contributions = round_up(factors.astype(np.float64) * norms)",
        "contributions = round_up(0.95 * factors.astype(np.float64) * norms)",
        *_CLIPPING,
        "opacus_adapter/test_adapter_alignment.py",
    ),
    _capture(
        "noise added before the step is written",
        "optimizers.py",
        "        self.tracker.record()\n        self.add_noise()",
        "        self.add_noise()\n        self.tracker.record()",
        *_ALIGNMENT,
        "opacus_adapter/test_adapter_checkpoint.py",
    ),
    _capture(
        "no noise added",
        "optimizers.py",
        "        self.tracker.record()\n        self.add_noise()",
        "        self.tracker.record()\n        self.noise_multiplier, kept = 0.0, self.noise_multiplier\n"
        "        self.add_noise()\n        self.noise_multiplier = kept",
        *_CLIPPING,
    ),
    _capture(
        "no slack for the rounding of norms",
        "clipping.py",
        "NORM_SLACK = 136 * 2.0**-24",
        "NORM_SLACK = -136 * 2.0**-24",
        "opacus_adapter/test_adapter_clipping.py",
    ),
    _capture(
        "infinite gradients enter the sum",
        "capture.py",
        "bad = int(np.count_nonzero(~np.isfinite(norms)))",
        "bad = int(np.count_nonzero(np.isnan(norms)))",
        "opacus_adapter/test_adapter_poison.py",
    ),
    _capture(
        "several forward passes per step",
        "capture.py",
        "if self._forwards != 1 and self.watches_forward:",
        "if self._forwards < 1 and self.watches_forward:",
        "opacus_adapter/test_adapter_guards.py",
    ),
    _capture(
        "batches attributed to the instances of the batch before",
        "capture.py",
        "positions = rows if mapping is None else mapping[rows]",
        "positions = (rows if mapping is None else mapping[rows]) // 2 * 2",
        *_ALIGNMENT,
    ),
    _capture(
        "thresholds of a sweep without their slack",
        "recording.py",
        "bounds = round_up(np.minimum(norms * rule.slack, float(self.optimizer.max_grad_norm)))",
        "bounds = round_up(np.minimum(norms / rule.slack, float(self.optimizer.max_grad_norm)))",
        "opacus_adapter/test_adapter_sweeps.py",
    ),
    _capture(
        "noise or clip norm changed inside a logical batch",
        "capture.py",
        "if self._mechanism is not None and self._mechanism != self.optimizer.mechanism_now:",
        "if False:",
        "opacus_adapter/test_adapter_guards.py",
    ),
    _planner(
        "noise of the unlearning steps counted twice",
        "bounds/interface.py",
        "return min(variance * total * _DOWN, _TAU_CAP)",
        "return min(2 * variance * total * _DOWN, _TAU_CAP)",
        "unlearning/test_contractive_bound.py",
    ),
    _planner(
        "one step fewer than the bound asks for",
        "planner.py",
        "steps=None if math.isinf(least) else int(least),",
        "steps=None if math.isinf(least) else max(int(least) - 1, 0),",
        "unlearning/test_planner.py",
    ),
    _planner(
        "limit of the plan's grid rounded down",
        "planner.py",
        "return next((k for k in self.grid if steps <= k <= self.limit), math.inf)",
        "return max((k for k in self.grid if k <= min(steps, self.limit)), default=math.inf)",
        "unlearning/test_everyone.py",
    ),
    _planner(
        "Gaussian divergence halved",
        "bounds/contractive.py",
        "return orders * (self.mu(steps) ** 2 / 2)",
        "return orders * (self.mu(steps) ** 2 / 4)",
        "unlearning/test_contractive_bound.py",
    ),
    _planner(
        "amplification by sampling for shuffled training",
        "chain.py",
        '[m.sample_rate if m.sampling == "poisson" else 1.0 for m in self.mechanisms]',
        "[m.sample_rate for m in self.mechanisms]",
        "unlearning/test_planner.py",
        "unlearning/test_subsampled_bound.py",
        "unlearning/test_filtered_runs.py",
    ),
    _certificate(
        "value above the target certified",
        "verification.py",
        'return None if claim.value <= claim.target else "the bound is above the target"',
        "return None",
    ),
    _certificate(
        "value not recomputed",
        "verification.py",
        "if not value <= p.claim.value * (1 + _TOLERANCE):",
        "if False:",
    ),
    _certificate(
        "certificate of another ledger accepted",
        "verification.py",
        "if not (e.ledger.holds(before) and e.ledger.holds(after)):",
        "if False:",
    ),
    _certificate(
        "any model file accepted",
        "verification.py",
        "if file_digest(e.checkpoint) == e.predicate.models.after",
        "if True",
    ),
    _certificate(
        "mechanism of the unlearning steps not compared",
        "verification.py",
        "if not Mechanism.of(phase).agrees_with(Mechanism(**p.mechanism.model_dump())):",
        "if False:",
    ),
    _certificate(
        "signature not verified",
        "signing.py",
        "        key.verify(signature, _encoding(payload))",
        "        _encoding(payload)",
    ),
)

QUICK: Final[Mapping[str, str]] = {
    "sign of log(order) flipped in the conversion": (
        "divergence/test_conversions.py::test_epsilon_is_at_least_the_exact_gaussian_one"
    ),
    "curve extrapolated beyond the largest order": (
        "divergence/test_conversions.py::test_interpolation_at_the_grid_beyond_it_and_with_inf"
    ),
    "filter looks at the past only, so it is one step late": (
        "accounting/test_filter_law.py::test_the_counterexample_is_stopped_and_a_filter_after_the_fact_is_not"
    ),
    "forgotten instances may be drawn again": (
        "ledger/test_ledger_facts.py::test_a_forgotten_instance_is_never_drawn_again"
    ),
    "thresholds called fixed after training began": (
        "ledger/test_ledger_facts.py::test_thresholds_are_fixed_before_the_first_step_or_never"
    ),
    "no slack for the rounding of norms": (
        "opacus_adapter/test_adapter_clipping.py::test_norms_are_tight_upper_bounds"
    ),
    "limit of the plan's grid rounded down": (
        "unlearning/test_everyone.py::test_a_public_grid_rounds_up_and_ends"
    ),
    "Gaussian divergence halved": ("unlearning/test_contractive_bound.py::test_common_hessian_fixture"),
    "signature not verified": (
        "unlearning/test_certificate.py"
        "::test_every_edit_of_the_envelope_or_the_certificate_breaks_the_signature"
    ),
}
"""Name of a bug, and one cheap test that catches it."""


def quick_mutants() -> tuple[Mutant, ...]:
    """The bugs of ``QUICK``, each with its one test."""
    return tuple(replace(m, tests=(QUICK[m.name],)) for m in MUTANTS if m.name in QUICK)
