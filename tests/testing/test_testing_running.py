"""Hangs are cut and reported, nothing passes that did not run, and ``pia check`` says so."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from hypothesis import strategies as st
from typer.testing import CliRunner

from per_instance_accountant.cli.commands import app
from per_instance_accountant.errors import UsageError
from per_instance_accountant.testing import parametrize_with_checks, run_checks, watch_checks
from per_instance_accountant.testing.accountants import RenyiAccountant
from per_instance_accountant.testing.search import Broken, CallHung, limited, search

NAN = ["impossible_input_is_refused"]
OURS = "per_instance_accountant.testing.accountants:RenyiAccountant"


def pia(*words):
    return CliRunner().invoke(app, ["check", *words])


def test_an_endless_loop_is_interrupted_even_if_it_catches_exceptions(seeded):
    start = time.process_time()
    report = run_checks(seeded.LoopsOnNan, laws=NAN, seconds=0.3)
    (verdict,) = report.verdicts
    assert not report.ok and verdict.smallest == "which=('noise_multiplier', nan)"
    assert "did not return within 0.3 CPU seconds" in verdict.what
    assert time.process_time() - start < 8


def test_a_call_that_sleeps_is_killed_and_the_next_law_is_asked(seeded_file):
    laws = ["no_steps_cost_nothing", *NAN, "steps_are_counted"]
    report = watch_checks(f"{seeded_file}:SleepsOnNan", laws=laws, examples=3, law_seconds=20)
    assert [v.status for v in report.verdicts] == ["held", "broken", "held"]
    assert report.verdicts[1].smallest == "which=('noise_multiplier', nan)"
    assert "stopped after 20 s" in report.verdicts[1].what


def test_an_accountant_that_always_hangs_is_given_up(tmp_path):
    (tmp_path / "hanging.py").write_text(
        "import time\nclass Hangs:\n    def step(self, **_): time.sleep(60)\n    epsilon = step\n"
        "class NoLicence(Hangs):\n    def __init__(self): raise RuntimeError('no licence')\n"
    )
    laws = ["epsilon_is_a_number", *NAN, "steps_add_up", "reading_changes_nothing"]
    report = watch_checks(f"{tmp_path / 'hanging.py'}:Hangs", laws=laws, law_seconds=4)
    assert [v.status for v in report.verdicts] == ["broken"] * 3 + ["not applicable"]
    assert not report.ok and "3 laws had to be stopped" in report.verdicts[3].what
    with pytest.raises(UsageError, match="raised RuntimeError: no licence"):
        watch_checks(f"{tmp_path / 'hanging.py'}:NoLicence")


def test_a_law_that_is_slow_is_unfinished_and_neither_held_nor_broken(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom per_instance_accountant.testing.accountants import RenyiAccountant\n"
        "class Slow(RenyiAccountant):\n"
        "    def step(self, **named): time.sleep(0.05); super().step(**named)\n"
    )
    laws = ["no_steps_cost_nothing", "steps_are_counted"]
    report = watch_checks(f"{tmp_path / 'slow.py'}:Slow", laws=laws, examples=5000, law_seconds=4)
    assert "unfinished" in {v.status for v in report.verdicts} and not report.broken
    assert not report.ok and report.unfinished[0].examples > 5
    done = pia(f"{tmp_path / 'slow.py'}:Slow", "--law", laws[1], "--examples", "5000", "--law-seconds", "4")
    assert done.exit_code == 1 and "--law-seconds" in done.output


def test_a_process_that_ends_is_a_failure(seeded_file):
    report = watch_checks(f"{seeded_file}:EndsTheProcess", laws=[*NAN, "steps_are_counted"])
    assert [v.status for v in report.verdicts] == ["broken", "held"]
    assert report.verdicts[0].what == "the process ended with code 7 before it answered"


def test_a_process_that_is_killed_says_by_what(tmp_path):
    (tmp_path / "dying.py").write_text(
        "import os, signal\nclass Dies:\n    def step(self, **_): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    epsilon = step\n"
    )
    seen = []
    report = watch_checks(f"{tmp_path / 'dying.py'}:Dies", laws=["steps_add_up"], follow=seen.append)
    assert "killed by signal 11 (Segmentation fault)" in report.verdicts[0].what
    assert tuple(seen) == report.verdicts


@pytest.mark.parametrize(("answer", "kind"), [("3.2", "str"), (None, "NoneType"), ([1.0], "list")])
def test_what_is_no_number_is_no_epsilon(answer, kind):
    class Answers(RenyiAccountant):
        def epsilon(self, delta):
            return answer

    report = run_checks(Answers, laws=["epsilon_is_a_number"], examples=2)
    assert report.verdicts[0].what == f"epsilon is a {kind}, no number"


def test_nothing_passes_that_did_not_run(seeded, seeded_file):
    report = run_checks(seeded.RefusesEverything, laws=["extreme_epsilon_is_never_wrong"], examples=5)
    assert not report.ok and report.examples == 0 and report.verdicts[0].what == "refuses every input"
    result = pia(f"{seeded_file}:RefusesEverything", "--law", "extreme_epsilon_is_never_wrong")
    assert result.exit_code == 2 and "Nothing was checked" in result.stdout
    with pytest.raises(UsageError, match="no law concerns"):
        parametrize_with_checks([RenyiAccountant], laws=["individuals_are_not_below_the_plain_sum"])
    with pytest.raises(UsageError, match="no law 'no_such'"):
        run_checks(RenyiAccountant, laws=["no_such"])


def test_exit_codes_and_pages(seeded_file):
    held = pia(OURS, "--law", "rdp_is_a_number", "--examples", "4", "--format", "json")
    document = json.loads(held.stdout)
    assert held.exit_code == 0
    assert (document["ok"], document["laws_run"], document["examples"]) == (True, 1, 5)
    broken = pia(f"{seeded_file}:CountsChanges", "--law", "steps_are_counted")
    assert broken.exit_code == 1
    assert "smallest input: steps=1, repeats=2" in broken.stdout and "1 laws run, 1 broken" in broken.stdout


@pytest.mark.parametrize("reference", ["no_such_module:X", "math", "math:pi", "math:no_such", "nowhere.py:X"])
def test_references_that_name_no_accountant(reference):
    command = [sys.executable, "-m", "per_instance_accountant", "check", reference]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Nothing" in done.stderr and done.stdout == ""


def test_the_laws_are_listed():
    listed = json.loads(pia("--list", "--format", "json").stdout)["laws"]
    assert len(listed) >= 30 and all(row["statement"] for row in listed)
    assert pia().exit_code == 1 and isinstance(pia().exception, UsageError)


def test_a_search_counts_and_shrinks():
    def body(point):
        if point["n"] > 70:
            raise Broken("too large")

    found = search(body, st.fixed_dictionaries({"n": st.integers(0, 10**6)}), examples=50)
    assert found.smallest == {"n": 71} and found.what == "too large" and found.examples > 1
    held = search(body, st.fixed_dictionaries({"n": st.integers(0, 70)}), examples=50)
    assert held.smallest is None and held.examples == 50
    known = search(body, st.fixed_dictionaries({"n": st.just(0)}), known=({"n": 99},), examples=3)
    assert known.smallest == {"n": 99}


def test_the_limit_is_lifted_after_the_block():
    with limited(0.2):
        pass
    start = time.process_time()
    while time.process_time() - start < 0.4:
        pass
    with pytest.raises(CallHung), limited(0.1):
        _loop()


def _loop():
    while True:
        pass


def test_the_room_does_without_torch_and_opacus():
    code = (
        "import sys, per_instance_accountant.testing.releases, per_instance_accountant.testing.audits, "
        "per_instance_accountant.testing.ledger_model, per_instance_accountant.testing.peers; "
        "print({'torch', 'opacus', 'dp_accounting'} & {name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['mpmath'] = None; import per_instance_accountant.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PIA061: mpmath is not installed" in done.stderr
