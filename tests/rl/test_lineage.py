"""This file tests rl/history.py, rl/lineage.py and rl/lineage_view.py: any thing of a run leads to all the others."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rl.archive import Archive
from rl.chooser import Choice, Numbers, Reason
from rl.cli import application
from rl.history import read_history
from rl.lineage import Genealogist, SampledTokens
from rl.lineage_view import render
from rl.recorder import Recorder, RunDirectory
from tests.rl.archive_samples import rich_group


class RunOfFour:
    """Four steps of two groups each, made as a real run records them: a rollback from step 4 to step 2 in between."""

    def __init__(self, path):
        self.directory = RunDirectory(path)
        self.directory.create()
        self.directory.config.touch()
        self.recorder, self.archive = Recorder(self.directory), Archive(self.directory)
        self.verified(0)
        for step in (1, 2):
            self.make(step, 2 * step - 2, 2 * step - 1)
        self.recorder.event("checkpoint", step=2)
        self.make(3, 4, 5)
        self.make(4, 6, 7)
        self.recorder.event("checkpoint", step=4)
        self.recorder.event("rollback", from_step=4, to_step=2, reason="rank 1 died")
        self.make(3, 4, 8, weights="other 3")  # group 5 was lost with Redis's last second
        self.recorder.event("dropped", group="run-1/00000009", prompt="sums/easy/9", reason="stale", tokens=15)

    def make(self, step, *draws, weights=None):
        groups = [rich_group(draw, version=max(0, step - 2), prompt=draw % 4) for draw in draws]
        self.recorder.ledger(step, step - 1, [group.group_id for group in groups])
        self.archive.write(step, groups)
        self.recorder.event("step", step=step, batch=f"batch {draws}", groups=len(groups))
        self.verified(step, weights)

    def verified(self, version, digest=None):
        digest = digest or f"digest {version}"
        self.recorder.event("weights_verified", version=version, digest=digest, bytes=9, generators=[1, 0])


@pytest.fixture
def made(tmp_path):
    return RunOfFour(tmp_path / "run-1")


def shown(lineage):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(lineage))
    return console.export_text()


def test_a_step_leads_to_its_groups_prompts_rewards_weights_and_checkpoints(made):
    found = Genealogist(made.directory).step(2)
    assert found.batch_digest == "batch (2, 3)" and found.made == 1 and found.checkpoints == (2,)
    assert (found.trained_from.digest, found.produced.digest) == ("digest 1", "digest 2")
    assert found.trained_from.generators == (0, 1) and found.rollbacks == () and found.problems == ()
    facts = found.groups[0]
    assert (facts.group, facts.draw, facts.prompt_id) == ("run-1/00000002", 2, "sums/easy/2")
    assert facts.versions == (0, 1) and facts.rewards == (1.0, None, 1 / 3)
    assert facts.reward_versions == {"format": "f1", "answer": "a7"} and facts.tokens == 15
    text = shown(found)
    assert all(told in text for told in ("batch (2, 3)", "digest 1", "1 failed 0.333333", "format f1, answer a7"))


def test_a_step_made_again_counts_as_last_made_and_tells_of_the_rollback(made):
    found = Genealogist(made.directory).step(3)
    assert found.made == 2 and found.batch_digest == "batch (4, 8)" and found.checkpoints == ()
    assert found.produced.digest == "other 3" and found.produced.earlier_digests == ("digest 3",)
    assert [(back.from_step, back.to_step, back.reason) for back in found.rollbacks] == [(4, 2, "rank 1 died")]
    assert "rank 1 died" in shown(found) and "2 times" in shown(found)


def test_a_step_that_a_rollback_took_back_is_planned_and_not_made(made):
    found = Genealogist(made.directory).step(4)
    assert found.batch_digest is None and found.made == 0 and found.checkpoints == ()
    assert Genealogist(made.directory).group("run-1/00000006").state.startswith("planned for step 4, which has not")


def test_a_group_leads_to_its_step_by_its_id_or_its_draw(made):
    found = Genealogist(made.directory).group("3")
    assert found == Genealogist(made.directory).group("run-1/00000003")
    assert found.step == 2 and found.state == "trained in step 2, saved by checkpoint 2" and found.checkpoints == (2,)
    assert found.facts is not None and found.facts.prompt_id == "sums/easy/3"
    assert "trained in step 2" in shown(found)
    assert Genealogist(made.directory).group("8").state == "trained in step 3, not saved yet"


def test_a_dropped_group_leads_to_its_reason(made):
    found = Genealogist(made.directory).group("9")
    assert found.step is None and found.state == "dropped: stale" and found.facts is None


def test_a_group_that_a_step_was_planned_with_and_made_without_is_not_trained(made):
    made.make(4, 5, 6)  # it was sampled again, and is trained now
    found = Genealogist(made.directory).group("5")
    assert found.step == 4 and found.given_up == (3,)
    assert "then made of other groups" in shown(found)


def test_a_prompt_leads_to_all_its_groups(made):
    found = Genealogist(made.directory).prompt("sums/easy/0")
    assert [(group.group, group.step) for group in found.groups] == [
        ("run-1/00000000", 1),
        ("run-1/00000004", 3),
        ("run-1/00000008", 3),
    ]
    dropped = Genealogist(made.directory).prompt("sums/easy/9")
    assert dropped.groups == () and dropped.dropped[0].reason == "stale"
    assert "trained in step 1" in shown(found) and "stale" in shown(dropped)


def test_a_version_leads_to_its_step_and_to_the_tokens_that_it_sampled(made):
    found = Genealogist(made.directory).version(1)
    assert found.made_by == 1 and found.facts.digest == "digest 1" and found.facts.generators == (0, 1)
    # of the three answers of 4, 5 and 6 tokens the first token each is of the older version
    assert found.sampled == (
        SampledTokens(step=2, group="run-1/00000002", tokens=12),
        SampledTokens(step=2, group="run-1/00000003", tokens=12),
        SampledTokens(step=3, group="run-1/00000004", tokens=3),
        SampledTokens(step=3, group="run-1/00000008", tokens=3),
    )
    assert "step 1" in shown(found) and "30 trained tokens" in shown(found)
    assert Genealogist(made.directory).version(0).made_by is None


def test_a_draw_leads_to_why_it_was_made_and_of_one_made_twice_the_last_counts(made):
    level, prompt = Numbers(0.41, 37.5, 0.55), Numbers(0.9, 16.0)
    facts = {"version": 2, "level": level, "signal": 0.93, "credit": 0.75}
    band = Reason(why="band", **facts, prompt_why="reprobe", prompt=prompt)
    made.recorder.draw(3, "run-1/00000003", "sums/easy/3", Choice("sums", "easy", Reason(why="explore", version=1)))
    made.recorder.draw(3, "run-1/00000003", "sums/easy/3", Choice("sums", "easy", band, "3"))
    lent = Reason(why="nearest", version=4, lender="products", notes={"mood": "good"})
    made.recorder.draw(10, "run-1/00000010", "sums/easy/3", Choice("sums", "easy", lent))
    found = Genealogist(made.directory).group("3")
    assert found.drawn is not None and found.drawn.reason == band
    text = shown(found)
    assert "source sums was due 0.75 draws" in text
    assert "level easy: band, the pass rate sampled from its belief lies in the band (pass rate 0.41 from 37.5" in text
    assert "sampled 0.55), at version 2" in text and "teaches with a chance of 0.93" in text
    assert "the prompt: reprobe, it was mastered long ago" in text
    drawn = Genealogist(made.directory).prompt("sums/easy/3")
    assert [each.draw for each in drawn.draws] == [3, 10]
    assert "source products lent its turn to sums" in shown(drawn) and "mood: good" in shown(drawn)
    assert Genealogist(made.directory).group("10").state == "drawn, and no step has taken it"


@pytest.mark.parametrize(
    "kind, what, told",
    [
        ("step", 9, "no step 9; the ledger ends at step 4"),
        ("group", "77", "no record of group run-1/00000077"),
        ("prompt", "nobody", "no step of run run-1 trained on prompt nobody"),
        ("version", 9, "no policy version 9; the newest is 3"),
    ],
)
def test_what_the_run_does_not_know_is_refused(made, kind, what, told):
    with pytest.raises(ValueError, match=told):
        getattr(Genealogist(made.directory), kind)(what)


def test_a_missing_or_damaged_archive_hides_only_what_it_held(made):
    made.archive.path_of(1).unlink()
    made.archive.path_of(2).write_bytes(b"PAR1 cut off")
    asked = Genealogist(made.directory)
    found = asked.step(2)
    assert found.group_ids == ("run-1/00000002", "run-1/00000003") and found.groups == ()
    assert "step_000002.parquet is damaged" in found.problems[0] and "is damaged" in shown(found)
    assert asked.group("2").state.startswith("trained in step 2") and asked.group("2").problems
    assert len(asked.version(0).problems) == 2
    with pytest.raises(ValueError, match="sums/easy/1.*step_000001.parquet does not exist.*step_000002"):
        asked.prompt("sums/easy/1")


def test_an_archive_of_another_batch_is_told(made):
    made.archive.write(2, [rich_group(0)])
    assert "holds other groups than the ledger" in Genealogist(made.directory).step(2).problems[0]


def test_cut_lines_of_ledger_and_events_are_passed_over_and_counted(made):
    for name in ("ledger.jsonl", "events.jsonl"):
        with (made.directory.path / name).open("a") as file:
            file.write('{"step": 4, "gro')
    found = Genealogist(made.directory).step(3)
    assert found.made == 2 and found.problems == ("events.jsonl has 1 unreadable line(s)",)


def test_a_resume_takes_back_what_no_checkpoint_held(made):
    made.recorder.event("resume", step=2)
    history = read_history(made.directory)
    assert set(history.steps) == {1, 2} and history.checkpoints == (2,)
    assert history.rollbacks[-1].reason == "rl resume" and history.rollbacks[-1].from_step == 3


def test_a_step_event_may_tell_the_digest_of_the_weights(made):
    made.recorder.event("step", step=4, batch="b", groups=2, weights="published 4")
    assert Genealogist(made.directory).version(4).facts.digest == "published 4"


def test_the_command_prints_tables_or_json(made):
    run = str(made.directory.path)
    table = CliRunner().invoke(application, ["lineage", run, "--step", "2"])
    assert table.exit_code == 0 and "batch (2, 3)" in table.output
    printed = CliRunner().invoke(application, ["lineage", run, "--group", "3", "--json"])
    assert printed.exit_code == 0 and json.loads(printed.output)["step"] == 2


@pytest.mark.parametrize("asked", [[], ["--step", "1", "--version", "1"], ["--step", "9"]])
def test_the_command_refuses_what_it_cannot_answer(made, asked):
    refused = CliRunner().invoke(application, ["lineage", str(made.directory.path), *asked])
    assert refused.exit_code == 2 and "refused" in refused.output and "Traceback" not in refused.output


def test_the_command_refuses_what_is_no_run(tmp_path):
    refused = CliRunner().invoke(application, ["lineage", str(tmp_path), "--step", "1"])
    assert refused.exit_code == 2 and "config.yaml does not exist" in refused.output
