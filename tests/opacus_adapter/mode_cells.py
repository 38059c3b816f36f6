"""The ways of training that the table in docs/opacus_modes.md speaks of, each trained and checked by hand."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import FixedThresholds, PrivacyFilter, Sweep, account
from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import Drop, Phase, Step, Thresholds
from per_instance_accountant.opacus_adapter import PrivacyEngine

COUNT, CLIP, LAYERS = 40, 2.0, (1.2, 0.5, 0.9, 0.6)
COUNT_STD = 2.0
MODES = ("hooks", "functorch", "ew", "ghost", "no_op")
CLIPPINGS = ("flat", "per_layer", "adaptive")
ADAPTIVE = {
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.2,
    "max_clipbound": 3.0,
    "min_clipbound": 0.05,
    "unclipped_num_std": COUNT_STD,
}
EXACT = 1e-5
"""Largest relative error of a recorded contribution against torch.func, in float32."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A column of the table: what the loop or the engine does besides the plain loop."""

    title: str
    engine: dict[str, Any] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 8
    double: bool = False
    autocast: bool = False
    later: bool = False
    """Whether the CPU is taken for an accelerator, on which nobody waits for norms."""


WORKERS = {"num_workers": 2, "persistent_workers": True}
FEATURES = {
    "plain": Feature(title="plain loop"),
    "virtual": Feature(title="`BatchMemoryManager`", limit=3),
    "workers": Feature(title="2 persistent workers", loader=WORKERS, limit=3),
    "unordered": Feature(title="`in_order=False`", loader={**WORKERS, "in_order": False}),
    "empty": Feature(title="empty batches", batch_size=1),
    "sum": Feature(title='`loss_reduction="sum"`', private={"loss_reduction": "sum"}),
    "shuffled": Feature(title="`poisson_sampling=False`", private={"poisson_sampling": False}),
    "unwrapped": Feature(title="`wrap_model=False`", private={"wrap_model": False}),
    "epsilon": Feature(
        title="`make_private_with_epsilon`",
        engine={"accountant": "gdp"},
        private={"target_epsilon": 2.0},
    ),
    "double": Feature(title="float64", double=True),
    "autocast": Feature(title="bfloat16 autocast", autocast=True),
    "thresholds": Feature(title="`FixedThresholds`", engine={"charging": "fixed"}, limit=3),
    "sweep": Feature(title="`Sweep`", engine={"charging": Sweep(every=3)}, limit=3),
    "later": Feature(title="contributions later, as on CUDA", limit=3, later=True),
    "filter": Feature(title="`PrivacyFilter`", engine={"filter": PrivacyFilter(budget=3.0, order=4.0)}),
}


class Small(nn.Module):
    """Layers that every mode can differentiate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 6, generator=generator) * torch.exp(torch.randn(COUNT, 1, generator=generator))
    return TensorDataset(x, torch.randint(0, 3, (COUNT,), generator=generator))


def thresholds() -> np.ndarray:
    return np.linspace(0.0, 3.0, COUNT)[np.random.default_rng(0).permutation(COUNT)]


def layer_gradients(
    module: nn.Module, parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> list[torch.Tensor]:
    """Per-instance gradients by torch.func, one (B, ...) tensor for each parameter."""

    def loss(p: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(module, p, (a[None],)), b[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return [found[name] for name in parameters]


class Loop:
    """One training in a cell of the table; ``taken`` holds parameters and gradients of every step."""

    def __init__(self, mode: str, clipping: str, feature: Feature) -> None:
        torch.manual_seed(1)
        self.mode, self.clipping, self.feature = mode, clipping, feature
        self.module, self.dataset = Small(), examples()
        if feature.double:
            self.module = self.module.double()
            self.dataset = TensorDataset(self.dataset.tensors[0].double(), self.dataset.tensors[1])
        self.twin = copy.deepcopy(self.module)
        engine = dict(feature.engine)
        if engine.get("charging") == "fixed":
            engine["charging"] = FixedThresholds(thresholds=thresholds())
        self.engine = PrivacyEngine(**{"accountant": "rdp", **engine})
        self.taken: list[dict[str, torch.Tensor]] = []
        self.stored: list[np.ndarray] = []
        self.drawn: list[list[int]] = []
        self._table = {row.numpy().tobytes(): i for i, row in enumerate(self.dataset.tensors[0])}
        self._make()

    def _make(self) -> None:
        private = dict(self.feature.private)
        arguments: dict[str, Any] = {
            "module": self.module,
            "optimizer": torch.optim.SGD(self.module.parameters(), lr=0.05),
            "data_loader": DataLoader(
                self.dataset, batch_size=self.feature.batch_size, **self.feature.loader
            ),
            "criterion": nn.CrossEntropyLoss(reduction=private.get("loss_reduction", "mean")),
            "max_grad_norm": list(LAYERS) if self.clipping == "per_layer" else CLIP,
            "grad_sample_mode": self.mode,
            "clipping": self.clipping,
            **(ADAPTIVE if self.clipping == "adaptive" else {}),
            **private,
        }
        if "target_epsilon" in private:
            made = self.engine.make_private_with_epsilon(target_delta=1e-3, epochs=2, **arguments)
        else:
            made = self.engine.make_private(noise_multiplier=1.5, **arguments)
        self.model = self.module if private.get("wrap_model") is False else made[0]
        self.optimizer, self.loader = made[1], made[-1]
        if self.feature.later:
            self.engine.tracker.recorder.deferral.devices = frozenset({"cpu"})
        self.criterion = made[2] if self.mode == "ghost" else arguments["criterion"]

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        if self.mode == "no_op":
            gradients = layer_gradients(self.module, self.parameters(), x, y) if len(x) else None
            for number, p in enumerate(self.module.parameters()):
                p.grad_sample = gradients[number] if gradients else torch.zeros(0, *p.shape, dtype=p.dtype)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.feature.autocast):
                loss = self.criterion(self.model(x), y)
            loss.backward()
        if self.feature.autocast:
            parts = [p.grad_sample.double().reshape(len(x), -1) for p in self.module.parameters()]
            self.stored.append(np.stack([part.norm(dim=1).numpy() for part in parts], axis=1))
        self.optimizer.step()

    def train(self, epochs: int = 2) -> None:
        writer = self.engine.tracker.recorder.writer
        for _ in range(epochs):
            with _physical(self) as loader:
                before, steps, rows = self.parameters(), writer.num_steps, []
                for x, y in loader:
                    self.step(x, y)
                    rows += [self._table[row.numpy().tobytes()] for row in x]
                    if writer.num_steps > steps:
                        self.taken.append(before)
                        self.drawn.append(sorted(rows))
                        before, steps, rows = self.parameters(), writer.num_steps, []


def _physical(loop: Loop) -> Any:
    if loop.feature.limit is None:
        return _Unsplit(loop.loader)
    return BatchMemoryManager(
        data_loader=loop.loader, max_physical_batch_size=loop.feature.limit, optimizer=loop.optimizer
    )


@dataclass
class _Unsplit:
    loader: Any

    def __enter__(self) -> Any:
        return self.loader

    def __exit__(self, *_: object) -> None:
        return None


def entered(loop: Loop, norms: np.ndarray, limit: np.ndarray, phase: Phase) -> np.ndarray:
    """What instances with these norms (B, parameters) contribute, by the definition of the clipping."""
    if loop.clipping == "per_layer":
        norms = np.minimum(norms, LAYERS)
    together = np.minimum(np.linalg.norm(norms, axis=1), np.minimum(limit, phase.max_grad_norm))
    if loop.clipping != "adaptive":
        return together
    # Two releases: in standard deviations, and back to one release with the stated noise.
    stated = phase.noise_std / phase.max_grad_norm
    own = (stated**-2 - (2 * COUNT_STD) ** -2) ** -0.5 * phase.max_grad_norm
    return phase.noise_std * np.hypot(together / own, 1 / (2 * COUNT_STD)) * (limit > 0)


def worst_error(loop: Loop) -> float:
    """Largest relative error of a recorded contribution; the positions must be those of the loader."""
    x, y = loop.dataset.tensors
    limit, dropped, worst = np.full(COUNT, np.inf), np.zeros(COUNT, dtype=bool), 0.0
    phase, steps = None, itertools.count()
    for event in loop.engine.ledger.events():
        if isinstance(event, Phase):
            phase = event
        elif isinstance(event, Thresholds):
            limit = event.values.astype(np.float64)
        elif isinstance(event, Drop):
            dropped[event.positions] = True
        elif isinstance(event, Step):
            number, rows = next(steps), event.positions.tolist()
            if loop.drawn[number] != sorted(rows):
                return np.inf
            if not rows:
                continue
            if loop.feature.autocast:
                norms = loop.stored[number]
            else:
                parameters = {name: p.double() for name, p in loop.taken[number].items()}
                found = layer_gradients(loop.twin, parameters, x[rows].double(), y[rows])
                norms = np.stack([g.reshape(len(rows), -1).norm(dim=1).numpy() for g in found], axis=1)
            expected = entered(loop, norms, np.where(dropped, 0.0, limit)[rows], phase)
            if (event.contributions[expected == 0] != 0).any():
                return np.inf
            some = expected > 0
            errors = np.abs(event.contributions[some].astype(np.float64) / expected[some] - 1)
            worst = max(worst, float(errors.max(initial=0.0)))
    return worst


def outcome(mode: str, clipping: str, feature: str) -> str:
    """``"exact"``, or the code with which the engine refuses to train this way."""
    try:
        loop = Loop(mode, clipping, FEATURES[feature])
        loop.train()
    except PiaError as error:
        return error.code
    steps = [event for event in loop.engine.ledger.events() if isinstance(event, Step)]
    if len(steps) != len(loop.taken) or len(steps) < 2 * len(loop.loader) - 2:
        return f"{len(steps)} of {len(loop.taken)} steps recorded"
    if feature == "empty" and all(len(step.positions) for step in steps):
        return "no empty batch was drawn"
    if not (account(loop.engine.ledger, orders=[4.0]).rdp >= 0).all():
        return "not accounted for"
    error = worst_error(loop)
    return "exact" if error <= EXACT else f"off by {error:.1e}"


HEADER = """# Modes of Opacus, as tested

Written by `WRITE_TABLES=1 pytest tests/opacus_adapter/test_adapter_modes.py` from the cells that passed; do
not edit. A cell is two epochs of training. **exact**: every recorded step names the instances of the loader,
and every contribution is within 1e-5, relative, of the clipped norm by `torch.func` in float64 (under
autocast: of the clipped norm of the stored gradients). A code is the typed error with which the engine
refuses before anything is released.

"""


def table(outcomes: dict[tuple[str, str, str], str]) -> str:
    """docs/opacus_modes.md."""
    rows = [(mode, clipping) for mode in MODES for clipping in CLIPPINGS]
    lines = [f"| | {' | '.join(f'{mode}<br>{clipping}' for mode, clipping in rows)} |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name, feature in FEATURES.items():
        cells = [outcomes[mode, clipping, name] for mode, clipping in rows]
        lines.append(f"| {feature.title} | {' | '.join(cells)} |")
    return HEADER + "\n".join(lines) + "\n" + REASONS


REASONS = """
Why some cells are refused:

- Ghost clipping with per-layer or adaptive clipping: Opacus has no optimizer for the first; its adaptive
  ghost engine divides a noisy count by the private batch size and calibrates the count's noise with it.
- Adaptive clipping with `FixedThresholds` or `Sweep`: the count query has a price of its own that moves with
  the clip norm, which a recorded threshold does not include. `WorstCase` and `Unamplified` charge it.
- `Sweep` in mode `no_op`: only the loop knows how to find gradients there.
- Expanded weights with `wrap_model=False`: nothing would run them; under autocast their backward pass fails.
- Ghost clipping under autocast: released gradients would be larger than their recorded norms.
"""
