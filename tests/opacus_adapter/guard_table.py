"""The ways in which a loop can make numbers wrong, what happens to them, and the test that shows it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Guard:
    loop: str
    stock: str
    here: str
    test: str
    """File without ``test_adapter_`` and name without ``test_``."""


def guards() -> list[Guard]:
    rows = [line.split("|") for line in TABLE.strip().splitlines()]
    return [Guard(*(cell.strip() for cell in row)) for row in rows]


TABLE = """
leaves a logical batch in its middle (`break`, an error) | its first parts enter the next release, too: up to twice the clip norm | PIA002; `abandon()` drops them | stock: a_logical_batch_left_in_its_middle
skips a part of a logical batch (`continue`) | flags of later batches move by one | PIA002 | guards: an_unfinished_logical_batch
changes the clip norm with ghost clipping | clips at the old norm, noise for the new one | both follow `optimizer.max_grad_norm` | stock: a_clip_schedule_with_ghost_clipping
changes the clip norm with per-layer clipping | the same | layers are scaled to `optimizer.max_grad_norm` | stock: a_clip_schedule_with_per_layer_clipping
changes clip norm or noise inside a logical batch | silent | PIA009 | guards: a_schedule_moves_inside_a_logical_batch
feeds packed sequences to DPLSTM, DPGRU, DPRNN | rows of different instances are clipped together | PIA060 | stock: packed_sequences_in_recurrent_layers
uses a weight outside of its layer | ghost: one instance is released above the clip norm | PIA090 with `verify=` | stock: a_weight_used_outside_of_its_layer
leaves a trainable layer out of a pass | ghost: takes a norm of an earlier batch | PIA003 | stock: a_layer_that_a_pass_leaves_out
runs backward twice for one step | ghost: the first half is dropped | PIA005 | stock: two_backward_passes_with_ghost_clipping
runs backward twice without Poisson sampling | adds rows, doubles the sample rate | PIA003 | guards: two_backward_passes_without_poisson_sampling
runs forward twice | adds rows | PIA005 | guards: two_forward_passes_in_one_step
runs forward without backward | misleading error | PIA005 | stock: a_forward_pass_without_backward
asks for an epsilon where `int(1 / q)` loses a step | spends more than the target | plans for the loader it returns | stock: the_epsilon_that_was_asked_for_is_kept
asks for an epsilon without Poisson sampling | calibrates for sampling that does not happen | PIA010 | stock: an_epsilon_for_sampling_that_does_not_happen
counts on amplification without Poisson sampling | silent | PIA010, default rule `Unamplified` | guards: refused_before_the_model_is_touched
samples at a rate that is no multiple of 2^-24 | draws at the multiple above: six times as often for 1e-8 | charges no less than it draws | drawing: stock_samplers_draw_more_often_than_their_rate
sets a default precision of 8 or 11 bits | draws up to half as often again | draws in float32 | drawing: the_default_precision_has_no_part_in_draws
changes the sampler's rate | silent | PIA010 | guards: the_sample_rate_cannot_change_behind_the_ledger
draws an empty first batch of dictionaries in a worker | TypeError, or a batch of another type | an empty dictionary batch | stock: empty_first_batches_of_dictionaries_in_workers
draws an empty batch with adaptive clipping | RuntimeError | a step nobody contributes to | stock: an_empty_batch_with_adaptive_clipping
splits batches with adaptive clipping | forgets votes, divides by a private size | all votes count, public denominator, count charged | stock: votes_of_all_physical_batches_count
makes a noise schedule cross the count's noise | complex numbers | PIA070 | stock: a_noise_schedule_that_adaptive_clipping_cannot_follow
compares runs on N and N - 1 instances | the denominator `int(N q)` tells | stated for a fixed denominator, which is recorded | stock: the_denominator_is_a_recorded_fact
has thousands of noise multipliers | evaluates each on its own | `per_instance` sums them at once | stock: schedules_with_thousands_of_noises_are_counted_at_once
trains in low precision | clipped gradients exceed the clip norm | PIA060 | guards: low_precision_parameters
trains ghost clipping under autocast | norms between 0 and 13.7 times the true ones | PIA060 | modes: a_way_of_training
lets PyTorch round float32 numbers before it multiplies them (`set_float32_matmul_precision("high")`; on CUDA the default for convolutions) | clipped sums exceed the clip norm, by up to one part in 250 | no matrix product in clipping, exact ones in both passes of ghost clipping | precision: both_passes_of_ghost_clipping_multiply_exactly
scales the loss with GradScaler | clips everybody | PIA060 | guards: a_grad_scaler
has a NaN or infinite input | all weights become NaN | PIA006 before anything is released | guards: a_gradient_that_is_not_finite
trains with a frozen BatchNorm in training mode | rows mix, statistics leave without noise | PIA060 | stock: a_frozen_batch_norm_that_collects_statistics
permutes the rows of a batch | silent | PIA090 with `verify=` | verifying: rows_that_are_not_the_loaders_are_found
filters or repeats rows | silent | PIA003 | guards: a_batch_of_another_size
flattens the batch dimension inside the model | silent, or an error about shapes | PIA003 | stock: layers_that_disagree_on_the_batch
steps twice on one batch | two steps are counted | PIA001 | guards: a_step_without_a_fresh_batch
steps on batches of another loader | silent | PIA007 | guards: a_step_on_a_batch_of_another_loader
reads batches ahead | silent | PIA007 | guards: a_loop_that_reads_one_batch_ahead
replaces the step hook | epsilon stays 0 | PIA004 | guards: a_replaced_step_hook
calls `make_private` twice | epsilon stays 0 | PIA060 | guards: second_make_private
steps the wrapped optimizer | no noise, no record | PIA008 | guards: a_step_around_the_noise
calls `signal_skip_step` | the sum leaks into the next batch | PIA002 | guards: skip_signals_by_hand
forgets `zero_grad` | ValueError | PIA002 | guards: zero_grad_forgotten
draws an instance several times in one batch | one clip norm is assumed | contributions are added | alignment: an_instance_drawn_twice_adds_up
trains on several processes that draw nobody in some steps | leaves those draws out: ranks take different numbers of steps, uncounted | an empty batch on that rank | ranks: empty_draws_keep_ranks_in_step
has an epsilon whose best order lies outside of the usual ones | warns, and reports more than is spent | orders for every range | stock: an_epsilon_at_the_end_of_the_orders
trains on CUDA, and is killed before norms have been copied | records no norms | the steps stay charged at the norms they were clipped at | deferral: a_killed_process_loses_no_step
uses a closure | fine | the same | stock: a_closure
sets the same seed after a restart | repeats the noise of its first steps | PIA091 | checkpoint: stock_opacus_repeats_its_noise_and_this_engine_refuses_to
asks for `secure_mode` | needs torchcsprng, which current PyTorch cannot install | noise and draws from the operating system | secure: training_needs_no_other_package_and_no_seed_repeats_it
asks for `secure_mode` with float64 parameters | float32 noise leaves the last bits of the sum alone | float64 noise, rounded once | secure: stock_noise_leaves_the_last_bits_of_a_sum_alone
asks for `secure_mode` on several processes | draws come from PyTorch's generator where it is not given another | PIA060 | secure: several_processes_are_refused
sets a seed in every step | the same noise always | PIA091 | stock: a_seed_that_is_set_in_every_step
adds a penalty to the loss under ghost clipping | its gradient is released once for every instance | PIA060 | stock: a_penalty_in_the_loss_of_ghost_clipping
sets `expected_batch_size` to the size of the batch | tells that size | PIA092 | stock: a_denominator_that_follows_the_batch
gives losses of shape (B, 1) to ghost clipping | multiplies every instance by the sum of all clip factors | clipped as (B,) | escapes: losses_of_one_column_with_ghost_clipping
gives one loss for a batch, or T for a batch of one, to ghost clipping | releases instances above the clip norm | PIA003 | escapes: a_criterion_without_one_loss_for_each_instance
freezes a layer between backward and step | moves it by its gradient without noise | the layer does not move | escapes: a_layer_frozen_between_backward_and_step
runs an ordinary backward pass after that of ghost clipping | releases its gradient unclipped | PIA005 | escapes: gradients_changed_after_the_backward_pass
adds a parameter from outside of the model to the optimizer | ghost: releases it unclipped | PIA003 | escapes: a_parameter_that_the_model_does_not_have
calls model.half() or bfloat16() after make_private | clipped gradients exceed the clip norm | PIA060 | escapes: low_precision_after_wrapping
seeds the loader's generator again, in an epoch or after a restart | draws the same instances, counts fresh sampling | PIA091 | escapes: a_loader_that_is_seeded_in_every_epoch
changes the noise of adaptive clipping's count inside a logical batch | silent | PIA009 | escapes: the_noise_of_the_count_inside_a_logical_batch
gives a weighted mean as criterion | instances scale each other's gradients | PIA101; in the loop alone PIA090 with `verify=` | escapes: losses_that_are_divided_by_something_of_the_batch
uses Embedding(max_norm=...) or scale_grad_by_freq | weights change without noise | PIA060 | stock: embeddings_that_change_their_weights
gives up a batch after an error, and goes on | rows of an unfinished backward pass are added to those of the next | dropped by `abandon()` | escapes: rows_of_a_batch_that_was_given_up_are_not_in_the_next_one
writes into the tensors of a batch | silent | PIA090 with `verify=` | verifying: rows_that_are_not_the_loaders_are_found
is killed and resumed, twice | forgets the steps after the checkpoint | they stay charged | checkpoint: killed_processes_resume_twice_from_one_checkpoint
loads a checkpoint that its ledger is behind of | silent | PIA040 names the steps | checkpoint: an_error_names_the_steps_that_the_ledger_lacks
loads a checkpoint from somebody else | runs code from it | reads plain values only, PIA060 | checkpoint: a_checkpoint_cannot_run_code
publishes a checkpoint | | it holds no norm and no loss of an instance | stock: a_checkpoint_holds_nothing_about_single_instances
"""  # noqa: E501


def missing() -> list[str]:
    """Tests that the table names and nobody wrote."""
    absent = []
    for guard in guards():
        file, _, name = guard.test.partition(": ")
        tree = ast.parse((HERE / f"test_adapter_{file}.py").read_text(encoding="utf-8"))
        if f"test_{name}" not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            absent.append(guard.test)
    return absent


HEADER = """# Guards

Written by `WRITE_TABLES=1 pytest tests/opacus_adapter/test_adapter_guard_table.py`; do not edit. Every
line has a test of that name in `tests/opacus_adapter/`. Where nothing else is said, the error comes before
anything is added, written or released.

| the loop or its script | stock Opacus | here | test |
|---|---|---|---|
"""


def table() -> str:
    """docs/opacus_guards.md."""
    lines = [f"| {g.loop} | {g.stock} | {g.here} | `{g.test.replace(': ', ':test_')}` |" for g in guards()]
    return HEADER + "\n".join(lines) + "\n" + OUTSIDE


OUTSIDE = """
Outside of what this package can see: the rounding of floating-point sums, noise that somebody predicts
because it does not come from `secure_mode`, and decisions that a script takes from what it looked at without
noise.
"""
