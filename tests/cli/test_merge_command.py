"""``pia merge``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step, new_run_id
from tests.cli.conftest import Pia

PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=0.25,
    noise_std=1.5,
    max_grad_norm=1.0,
    charging="unamplified",
    denominator=3.0,
    learning_rate=0.1,
)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two ranks; the second did not record the last step."""
    identity, paths = new_run_id(), [tmp_path / "rank-0", tmp_path / "rank-1"]
    for rank, path in enumerate(paths):
        run = Run(num_instances=6, run_id=identity, rank=rank, world_size=2)
        with LedgerWriter.create(path, run) as writer:
            writer.append(PHASE)
            for _ in range(2 - rank):
                writer.append(Step(positions=np.array([rank]), contributions=np.ones(1, np.float32)))
    return paths


def test_merge_says_what_was_missing_and_audit_reads_the_result(
    pia: Pia, parts: list[Path], tmp_path: Path
) -> None:
    done = pia("merge", parts[1], parts[0], "-o", tmp_path / "whole", "--format", "json")
    document = json.loads(done.out)
    assert done.code == 0
    assert (document["ranks"], document["steps"], document["incomplete_steps"]) == (2, 2, 1)
    assert document["incomplete"] == [[1, 2]] and document["confirmed"] is False
    assert document["anchor"] == Ledger.open(tmp_path / "whole").anchor.to_dict()
    audited = pia("audit", tmp_path / "whole")
    assert audited.code == 0 and "1 steps are not in all the others" in audited.out
    table = pia("merge", *parts, "-o", tmp_path / "again")
    assert "1 steps are not in all the others" in table.out


def test_a_lost_part_must_be_allowed(pia: Pia, parts: list[Path], tmp_path: Path) -> None:
    refused = pia("merge", parts[0], "-o", tmp_path / "whole")
    assert (refused.code, refused.out) == (3, "") and refused.err.startswith("error: PIA116")
    assert not (tmp_path / "whole").exists()
    done = pia("merge", parts[0], "-o", tmp_path / "whole", "--allow-missing", "--format", "json")
    assert json.loads(done.out)["lost"] == [1]


@pytest.mark.parametrize(("which", "code"), [((0, 0, 1), "PIA115"), ((0, 1), "PIA045")])
def test_merge_refuses_parts_twice_and_full_destinations(
    pia: Pia, parts: list[Path], tmp_path: Path, which: tuple[int, ...], code: str
) -> None:
    target = tmp_path / "rank-0" if code == "PIA045" else tmp_path / "whole"
    done = pia("merge", *(parts[rank] for rank in which), "-o", target)
    assert (done.code, done.out) == (3, "") and done.err.startswith(f"error: {code}")


def test_a_part_alone_is_not_audited(pia: Pia, parts: list[Path]) -> None:
    done = pia("audit", parts[0])
    assert done.code == 2 and done.err.startswith("error: PIA117")
