"""What stock Opacus does with loops that make its numbers wrong, and what happens to the same loops here."""

from __future__ import annotations

import copy
import logging
import math
import time
from statistics import NormalDist

import numpy as np
import opacus
import pytest
import torch
from opacus import GradSampleModule
from opacus.layers import DPLSTM
from opacus.schedulers import ExponentialGradClip
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from per_instance_accountant import audit
from per_instance_accountant.errors import AlignmentError, GuaranteeError, UnsupportedError
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step
from per_instance_accountant.opacus_adapter import PerInstanceAccountant, PrivacyEngine
from per_instance_accountant.opacus_adapter.optimizers import OLD
from tests.opacus_adapter.test_adapter_guards import Conditional

CLIP = 0.8
NOISELESS = {"noise_multiplier": 0.0, "max_grad_norm": CLIP}
MODERN = pytest.mark.skipif(OLD, reason="needs Opacus 1.6")


def backward(training, x, y):
    training.criterion(training.model(x), y).backward()


def released(training):
    """The sum that was released, noise being 0: gradients times the expected batch size."""
    gradient = torch.cat([p.grad.flatten() for p in training.module.parameters()])
    return gradient * training.optimizer.expected_batch_size


def one(scale=10.0):
    """A data set of one instance, drawn in every step: what is released is what it contributes."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(scale * torch.randn(1, 10, generator=generator), torch.zeros(1, dtype=torch.int64))


def single(start, engine=None, **arguments):
    return start(engine, dataset=one(), batch_size=1, **{**NOISELESS, **arguments})


# -------------------- batches and virtual steps


def broken_off(training):
    """Steps the first part of a logical batch, leaves the loop, and steps one whole logical batch."""
    first = None
    with training.physical(40) as loader:
        for batch in loader:
            first = batch
            training.step(batch)
            break
    for p in training.module.parameters():
        p.kept = None if p.summed_grad is None else p.summed_grad.clone()
    kept = torch.cat([p.kept.flatten() for p in training.module.parameters()])
    with training.physical(40) as loader:
        for batch in loader:
            training.step(batch)
            if all(p.grad is not None and p.grad.abs().sum() > 0 for p in training.module.parameters()):
                break
    return first, kept


def test_a_logical_batch_left_in_its_middle(start, stock):
    """P1. The instances of the first part enter the next release twice."""
    whole = start(stock(), batch_size=97, **NOISELESS)
    with whole.physical(None) as loader:
        whole.step(next(iter(loader)))
    expected = released(whole)
    theirs = start(stock(), batch_size=97, **NOISELESS)
    _, kept = broken_off(theirs)
    assert kept.norm() > CLIP
    # The stock queue still asks for the number of parts of the batch that was left.
    twice = released(theirs)
    assert not torch.allclose(twice, expected, rtol=1e-3)
    assert float((twice - expected).norm()) > CLIP
    with pytest.raises(AlignmentError, match="PIA002"):
        broken_off(start(batch_size=97, **NOISELESS))


def test_a_forward_pass_without_backward(start, stock):
    """Stock complains about gradients that are not initialised, or nothing at all."""
    training = start()
    x, y = next(iter(training.loader))
    training.model(x)
    training.optimizer.zero_grad()
    backward(training, x, y)
    with pytest.raises(AlignmentError, match="PIA005"):
        training.optimizer.step()


def test_a_closure(start):
    training = start()
    for x, y in training.loader:

        def closure(x=x, y=y):
            training.optimizer.zero_grad()
            backward(training, x, y)

        training.optimizer.step(closure)
    assert len(training.steps) == len(training.loader)


@MODERN
def test_empty_first_batches_of_dictionaries_in_workers():
    """P9. Opacus learns what an empty batch looks like from a full one, in every worker anew."""
    logging.getLogger("opacus").setLevel(logging.ERROR)

    def loader(engine):
        module = nn.Linear(4, 2)
        return engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(Dictionaries(), batch_size=1, num_workers=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

    def kinds(made):
        torch.manual_seed(5)
        return {type(batch) for batch in made[-1]}

    model, optimizer, tracked = loader(PrivacyEngine(accountant="rdp"))
    torch.manual_seed(5)
    for batch in tracked:
        assert isinstance(batch, dict) and batch["x"].shape[1:] == (4,)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["x"]), batch["y"]).backward()
        optimizer.step()
    try:
        theirs = kinds(loader(opacus.PrivacyEngine(accountant="rdp")))
    except TypeError:
        return
    assert theirs != {dict}


class Dictionaries(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(row)
        return {"x": torch.randn(4, generator=generator), "y": row % 2}


def test_layers_that_disagree_on_the_batch(start):
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.last = nn.Linear(5, 4), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.words(x.reshape(-1, 5)).reshape(len(x), 8))

    for mode in ("hooks", "ghost"):
        training = start(mode=mode, module=Flattening())
        with pytest.raises(AlignmentError, match="PIA003"):
            training.step(next(iter(training.loader)))


# -------------------- clipping and noise


def scheduled(training):
    scheduler = ExponentialGradClip(training.optimizer, gamma=0.1)
    training.step(next(iter(training.loader)))
    scheduler.step()
    training.step(next(iter(training.loader)))
    return float(released(training).norm())


def test_a_clip_schedule_with_ghost_clipping(start, stock):
    """P2. Stock clips at the old norm and makes noise for the new one, ten times too little."""
    assert scheduled(single(start, stock(), mode="ghost")) > 9 * 0.1 * CLIP
    assert scheduled(single(start, mode="ghost")) <= 0.1 * CLIP


def test_a_clip_schedule_with_per_layer_clipping(start, stock):
    """P2. The same with the norms of the layers."""
    layers = {"clipping": "per_layer", "max_grad_norm": [0.4] * 4, "noise_multiplier": 0.0}
    theirs, ours = (start(e, dataset=one(), batch_size=1, **layers) for e in (stock(), None))
    assert scheduled(theirs) > 5 * 0.1 * CLIP
    assert scheduled(ours) <= 0.1 * CLIP


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory, self.last = DPLSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.last(self.memory(packed)[1][0][-1])


def test_packed_sequences_in_recurrent_layers(start):
    """P3. Rows of the recurrent layer are in order of length, those of the other layers are not."""
    torch.manual_seed(0)
    lengths, module = torch.tensor([3, 7, 2, 5, 6]), Sequences()
    x = torch.randn(5, 7, 4) * torch.arange(1.0, 6)[:, None, None]
    own = []
    for row in range(5):
        loss = module(x[row : row + 1], lengths[row : row + 1])[0, 0]
        found = torch.autograd.grad(loss, [*module.memory.parameters()])
        own.append(torch.cat([g.flatten() for g in found]).norm())
    exact = torch.stack(own)
    wrapped = GradSampleModule(module, loss_reduction="sum")
    wrapped(x, lengths)[:, 0].sum().backward()
    rows = [p.grad_sample.flatten(1) for p in module.memory.parameters()]
    norms = torch.cat(rows, dim=1).norm(dim=1)
    assert torch.allclose(norms, exact[lengths.argsort(descending=True)], rtol=1e-4)
    assert not torch.allclose(norms, exact, rtol=1e-2)
    with pytest.raises(UnsupportedError, match="DPLSTM"):
        start(module=Sequences())


class Reusing(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.last(nn.functional.linear(torch.tanh(self.inner(x)), 5 * self.inner.weight))


def test_a_weight_used_outside_of_its_layer(start, stock):
    """P4. Stock ghost clipping releases one instance with more than the clip norm."""
    theirs = single(start, stock(), mode="ghost", module=Reusing())
    theirs.step(next(iter(theirs.loader)))
    assert float(released(theirs).norm()) > 1.05 * CLIP
    ours = single(start, PrivacyEngine(accountant="rdp", verify="first_step"), mode="ghost", module=Reusing())
    with pytest.raises(AlignmentError, match="PIA090"):
        ours.step(next(iter(ours.loader)))


def skipping(training):
    training.step(next(iter(training.loader)))
    training.module.short = True
    training.step(next(iter(training.loader)))


def test_a_layer_that_a_pass_leaves_out(start, stock):
    """P5. Stock ghost clipping takes the norm of the last batch that used the layer."""
    theirs = single(start, stock(), mode="ghost", module=Conditional())
    skipping(theirs)
    assert theirs.module.middle.weight._norm_sample is not None
    with pytest.raises(AlignmentError, match="PIA003"):
        skipping(single(start, mode="ghost", module=Conditional()))
    with pytest.raises(AlignmentError, match="PIA003"):
        skipping(single(start, module=Conditional()))


def halves(training):
    x, y = training.dataset.tensors
    next(iter(training.loader))
    training.optimizer.zero_grad()
    for part in (slice(0, 48), slice(48, 97)):
        backward(training, x[part], y[part])
    training.optimizer.step()


def test_two_backward_passes_with_ghost_clipping(start, stock):
    """P6. Stock drops the first half of the batch."""
    theirs, other = (start(stock(), mode="ghost", batch_size=97, **NOISELESS) for _ in range(2))
    halves(theirs)
    x, y = other.dataset.tensors
    other.optimizer.zero_grad()
    backward(other, x[48:], y[48:])
    other.optimizer.step()
    assert torch.equal(released(theirs), released(other))
    with pytest.raises(AlignmentError, match=r"PIA00[35]"):
        halves(start(mode="ghost", batch_size=97, **NOISELESS))


# -------------------- sampling and epsilon


def test_the_epsilon_that_was_asked_for_is_kept(stock):
    """P7. Opacus plans for another rate than its loader's: 1/99 and 1/98."""
    assert planned(stock()) > 2.0
    assert planned(PrivacyEngine(accountant="rdp")) <= 2.0


def planned(engine):
    """Epsilon after the epochs that were planned, over the loader that was returned."""
    module = nn.Linear(10, 3)
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(99, 10), torch.zeros(99)), batch_size=1),
        target_epsilon=2.0,
        target_delta=1e-4,
        epochs=3,
        max_grad_norm=1.0,
        epsilon_tolerance=1e-3,
    )
    engine.accountant.history = [(optimizer.noise_multiplier, 1 / len(loader), 3 * len(loader))]
    return engine.get_epsilon(1e-4)


def test_an_epsilon_for_sampling_that_does_not_happen(start, stock):
    """P10. Stock counts a shuffled loader as if it drew with probability 1/8."""
    theirs = start(stock(), poisson_sampling=False).train()
    assert theirs.engine.accountant.history[0][1] < 1
    ours = start(poisson_sampling=False).train()
    assert {phase.amplification_rate for phase in ours.engine.ledger.phases} == {1.0}
    module = nn.Linear(10, 3)
    with pytest.raises(GuaranteeError, match="PIA010"):
        PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=DataLoader(one(), batch_size=1),
            target_epsilon=2.0,
            target_delta=1e-4,
            epochs=3,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )


@pytest.mark.parametrize("count", [99, 100, 101])
def test_the_denominator_is_a_recorded_fact(start, count):
    """P12. Opacus divides by int(N * rate), which depends on N: neighbours keep the denominator."""
    data = TensorDataset(torch.randn(count, 10), torch.zeros(count, dtype=torch.int64))
    training = start(dataset=data, batch_size=10).train()
    (phase,) = [event for event in training.engine.ledger.events() if isinstance(event, Phase)]
    assert phase.denominator == training.optimizer.expected_batch_size


def test_schedules_with_thousands_of_noises_are_counted_at_once():
    """P14. Opacus evaluates every entry of its history on its own."""
    accountant = PerInstanceAccountant()
    accountant.history = [(1.0 + 1e-3 * step, 0.01, 1) for step in range(2000)]
    begin = time.process_time()
    epsilon = accountant.get_epsilon(1e-5)
    assert 0.5 < epsilon < 3 and time.process_time() - begin < 5


def test_a_checkpoint_holds_nothing_about_single_instances(start, tmp_path):
    """P18. Norms and losses are as private as the data."""
    training = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    training.engine.save_checkpoint(path=tmp_path / "model.pt", module=training.model)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    sizes = {p.numel() for p in training.module.parameters()}
    assert {t.numel() for t in content["module_state_dict"].values()} == sizes
    assert "positions" not in str(content["per_instance_accountant"])
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0


# -------------------- adaptive clipping

ADAPTIVE = {
    "clipping": "adaptive",
    "max_grad_norm": 0.8,
    "noise_multiplier": 0.0,
    "target_unclipped_quantile": 0.9,
    "clipbound_learning_rate": 0.5,
    "max_clipbound": 50.0,
    "min_clipbound": 1e-3,
    "unclipped_num_std": 1e-9,
}


def test_votes_of_all_physical_batches_count(start, stock, by_hand, models):
    """P11. Stock forgets all but the last physical batch, and divides by its private size."""
    theirs = start(stock(), batch_size=97, **ADAPTIVE)
    sizes = []
    update = theirs.optimizer.update_max_grad_norm
    theirs.optimizer.update_max_grad_norm = lambda: (sizes.append(theirs.optimizer.sample_size), update())
    theirs.train(1, 40)
    assert sizes and max(sizes) < 97

    module, _ = models["perceptron"]()
    twin = copy.deepcopy(module)
    ours = start(batch_size=97, module=module, **ADAPTIVE)
    x, y = ours.dataset.tensors
    norms = by_hand(twin, ours.parameters(), x, y)
    votes = (norms <= 0.8).sum() - 0.5 * 97
    ours.train(1, 40)
    expected = 0.8 * np.exp(-0.5 * (0.5 + votes / 97 - 0.9))
    assert ours.optimizer.max_grad_norm == pytest.approx(expected, rel=1e-6)


def test_adaptive_clipping_equals_stock_where_stock_is_right(start, stock):
    """Full batches of public size, no virtual steps: same weights, same clip norms."""
    settings = {**ADAPTIVE, "noise_multiplier": 0.5, "unclipped_num_std": 3.0, "poisson_sampling": False}
    ours, theirs = (start(e, batch_size=97, **settings).train(6) for e in (None, stock()))
    assert torch.allclose(ours.weights, theirs.weights, rtol=1e-4, atol=1e-6)
    assert float(ours.optimizer.max_grad_norm) == pytest.approx(float(theirs.optimizer.max_grad_norm), 1e-5)
    assert float(ours.optimizer.max_grad_norm) != 0.8


def test_an_empty_batch_with_adaptive_clipping(start, stock):
    """P11. Stock fails on the empty batches that Poisson sampling draws."""
    settings = {**ADAPTIVE, "noise_multiplier": 0.5, "unclipped_num_std": 3.0, "batch_size": 1}
    with pytest.raises(RuntimeError):
        start(stock(), **settings).train(1)
    assert any(not len(step.positions) for step in start(**settings).train(1).steps)


def test_votes_of_an_abandoned_batch_do_not_count(start):
    training = start(batch_size=97, **ADAPTIVE)
    with training.physical(40) as loader:
        training.step(next(iter(loader)))
    assert training.optimizer.unclipped_num != 0
    training.engine.abandon()
    assert training.optimizer.unclipped_num == 0


def test_a_noise_schedule_that_adaptive_clipping_cannot_follow(start):
    """The count would cost more than both releases may: stock computes a complex number."""
    training = start(**{**ADAPTIVE, "noise_multiplier": 0.5, "unclipped_num_std": 1.0})
    training.optimizer.noise_multiplier = 2.5
    with pytest.raises(ValueError, match="PIA070"):
        training.step(next(iter(training.loader)))
    assert training.steps == []


# -------------------- mixing layers


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.norm.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_a_frozen_batch_norm_that_collects_statistics(start, stock):
    """Stock accepts it: rows mix, and the running mean leaves the training without noise."""
    theirs = start(stock(), module=Normalised())
    before = theirs.module.norm.running_mean.clone()
    theirs.train()
    assert not torch.equal(theirs.module.norm.running_mean, before)
    ours = start(module=Normalised())
    with pytest.raises(UnsupportedError, match="BatchNorm1d"):
        ours.train()
    ours.engine.abandon()
    ours.module.norm.eval()
    assert ours.train().steps
    assert torch.equal(ours.module.norm.running_mean, before)


# -------------------- noise and scale


def seeding(training):
    drawn = []
    for batch in training.loader:
        torch.manual_seed(7)
        training.step(batch)
        drawn.append(training.optimizer.generator is None)
    return drawn


def test_a_seed_that_is_set_in_every_step(start, stock):
    """Stock draws the same noise always."""
    assert len(seeding(start(stock()))) > 1
    ours = start()
    with pytest.raises(GuaranteeError, match="PIA091"):
        seeding(ours)
    assert len(ours.steps) == 1


def test_a_part_of_the_noise_of_an_earlier_step(start):
    """A seed in every step before numbers that dropout uses: the state differs, the noise is shifted."""

    def noise(number):
        torch.manual_seed(7)
        torch.rand(16 * number)
        return torch.normal(0.0, 1.0, (96,))

    assert torch.equal(noise(1)[:64], noise(0)[16:80])

    def shifting(training, shifts):
        for number, batch in zip(shifts, training.loader, strict=False):
            torch.manual_seed(7)
            torch.rand(16 * number)
            training.step(batch)

    for shifts in ([0, 1], [1, 0]):
        ours = start()
        with pytest.raises(GuaranteeError, match="PIA091"):
            shifting(ours, shifts)
        assert len(ours.steps) == 1


def test_steps_that_share_a_block_of_random_numbers():
    """So few parameters that the generator gives many steps noise from the same 624 words: no refusal."""
    examples = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.randn(20, 1))
    model, engine = torch.nn.Linear(2, 1), PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(examples, batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for _ in range(10):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert engine.ledger.num_steps == 100


def penalised(training):
    x, y = next(iter(training.loader))
    training.optimizer.zero_grad()
    penalty = 10 * sum(p.square().sum() for p in training.module.parameters())
    (training.criterion(training.model(x), y) + penalty).backward()
    training.optimizer.step()
    return float(released(training).norm())


def test_a_penalty_in_the_loss_of_ghost_clipping(start, stock):
    """Stock releases its gradient once for every instance, beyond the clip norm."""
    assert penalised(single(start, stock(), mode="ghost")) > 5 * CLIP
    with pytest.raises(UnsupportedError, match="PIA060"):
        penalised(single(start, mode="ghost"))
    training = start(mode="ghost")
    x, y = next(iter(training.loader))
    training.optimizer.zero_grad()
    loss = training.criterion(training.model(x), y)
    (0.5 * loss + 0.5 * loss).backward()
    training.optimizer.step()
    assert len(training.steps) == 1


def averaging(training):
    for x, y in training.loader:
        training.optimizer.zero_grad()
        backward(training, x, y)
        training.optimizer.expected_batch_size = max(1, len(x))
        training.optimizer.step()


def test_a_denominator_that_follows_the_batch(start, stock):
    """Every step would tell the size of its batch."""
    averaging(start(stock()))
    ours = start()
    with pytest.raises(GuaranteeError, match="PIA092"):
        averaging(ours)


def test_embeddings_that_change_their_weights(start):
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        module = nn.Sequential(nn.Embedding(5, 4, **options), nn.Flatten(), nn.Linear(4, 3))
        with pytest.raises(UnsupportedError, match="PIA060"):
            start(module=module)


def test_an_epsilon_at_the_end_of_the_orders():
    """One release with little noise cost is best bounded at an order that Opacus does not look at."""
    accountant = opacus.accountants.RDPAccountant()
    accountant.step(noise_multiplier=60.0, sample_rate=1.0)
    with pytest.warns(UserWarning, match="largest alpha"):
        stock = accountant.get_epsilon(1e-6)
    writer = LedgerWriter.create(None, Run(num_instances=2))
    writer.append(
        Phase(
            kind="train",
            sampling="poisson",
            sample_rate=1.0,
            noise_std=60.0,
            max_grad_norm=1.0,
            charging="worst_case",
            denominator=2.0,
            learning_rate=0.1,
        )
    )
    writer.append(Step(positions=np.arange(2), contributions=np.ones(2, np.float32)))
    ours = audit(writer.ledger(), delta=1e-6, tight=False).worst_case
    exact = exact_gaussian_epsilon(1 / 60.0, 1e-6)
    assert exact <= ours < stock * 0.95


def exact_gaussian_epsilon(mu, delta):
    """Balle and Wang 2018, by bisection."""
    normal = NormalDist()

    def spent(epsilon):
        near = normal.cdf(mu / 2 - epsilon / mu)
        return near - math.exp(epsilon) * normal.cdf(-mu / 2 - epsilon / mu)

    low, high = 0.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high
