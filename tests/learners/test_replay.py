"""This file tests learners/replay.py: a step computed again, alone, has the loss that the run recorded of it."""

from __future__ import annotations

import io
import json
import math
import pathlib
import random
import shutil

import msgspec
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from learners.learner import Learner
from learners.replay import replay
from learners.weight_sender import digest_tensors
from rl import checkpoints
from rl.archive import Archive
from rl.cli import application
from rl.codec import entry_of
from rl.config_loading import dump_config, load_config
from rl.orders import StepOrder
from rl.recorder import Recorder, RunDirectory
from rl.replay import TOLERANCE, plan_replay, render
from rl.trajectory import VersionSpan
from rl.weights import combined
from tests.learners.tiny import random_group, run_ranks, save_tiny_llama, settings_for

STEPS, PER_STEP, SAVED_STEP = 3, 6, 2
# a rank has several micro-batches, and the clip and the warm-up play their parts
OPTIONS = {"micro_batch_tokens": 80, "max_grad_norm": 0.5, "warmup_steps": 2, "lr": 1e-3}


def batch(step: int):
    """A batch whose answers were sampled under versions up to the one before the step."""
    groups = []
    for index in range(PER_STEP):
        group = random_group(100 * step + index, rewards=(0.0, 1.0, None, 0.5))
        trajectories = []
        for trajectory in group.trajectories:
            length, version = len(trajectory.completion.token_ids), random.Random(index).randrange(step)
            completion = msgspec.structs.replace(trajectory.completion, spans=(VersionSpan(version, 0, length),))
            trajectories.append(msgspec.structs.replace(trajectory, completion=completion))
        groups.append(msgspec.structs.replace(group, trajectories=tuple(trajectories)))
    return groups


def train(rank: int, world_size: int, model_dir: str, run: str, rendezvous: str) -> None:
    """One rank of a run that records what a real one does. Runs in a process of its own, too."""
    directory = RunDirectory(run)
    recorder, archive = Recorder(directory), Archive(directory)
    by_id = {group.group_id: group for step in range(1, STEPS + 1) for group in batch(step)}
    settings = settings_for(model_dir, pathlib.Path(rendezvous), **OPTIONS)
    learner = Learner(settings, rank, world_size, lambda ids: [by_id[group_id] for group_id in ids])
    for step in range(1, STEPS + 1):
        entries = tuple(entry_of(group, 1) for group in batch(step))
        if rank == 0:
            recorder.ledger(step, step - 1, [entry.group_id for entry in entries])
            archive.write(step, batch(step))
        report = learner.step(StepOrder(step=step, version=step - 1, entries=entries, first=False))
        weights = learner._whole_weights()
        if rank == 0:
            recorder.step(step, report.metrics)
            recorder.event("step", step=step, batch=report.batch_digest, groups=len(entries))
            digest = combined(digest_tensors(weights))
            recorder.event("weights_verified", version=step, digest=digest, bytes=1, generators=[0])
        if step == SAVED_STEP:
            folder = checkpoints.folder_of(directory.checkpoints, step)
            learner.begin_save(str(folder), export=False)
            learner.finish_save()
            if rank == 0:
                checkpoints.complete(folder, checkpoints.Manifest(run_id=directory.run_id, step=step, version=step))
                recorder.event("checkpoint", step=step)
    learner.close()


@pytest.fixture(scope="module")
def model_of_two_layers(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run_of(model_of_two_layers, tmp_path_factory):
    """Makes the directory of a run of so many ranks; each is trained once."""
    made: dict[int, pathlib.Path] = {}

    def make(ranks: int) -> RunDirectory:
        if ranks not in made:
            folder = tmp_path_factory.mktemp("runs")
            made[ranks] = folder / f"run-{ranks}"
            RunDirectory(made[ranks]).create()
            arguments = (model_of_two_layers, str(made[ranks]), str(folder / "ranks"))
            if ranks == 1:
                train(0, 1, *arguments)
            else:
                run_ranks(train, ranks, *arguments)
        return RunDirectory(made[ranks])

    return make


@pytest.fixture
def copy_of(run_of, tmp_path):
    """The same, of its own: something is going to be broken."""

    def make(ranks: int) -> RunDirectory:
        whole = run_of(ranks)
        shutil.copytree(whole.path, tmp_path / whole.run_id)
        return RunDirectory(tmp_path / whole.run_id)

    return make


@pytest.fixture
def replayed(model_of_two_layers, tmp_path):
    def make(directory: RunDirectory, step: int, tolerance: float = TOLERANCE):
        settings = settings_for(model_of_two_layers, tmp_path / "alone", **OPTIONS)
        return replay(plan_replay(directory, step), directory, settings, tolerance)

    return make


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_the_checkpoint_before_it_a_step_has_the_very_loss(run_of, replayed, ranks):
    found = replayed(run_of(ranks), STEPS)
    assert found.recomputed == found.recorded and found.agrees
    assert found.same_weights and found.retrained == 0 and found.started_from == "step_000002"
    assert found.scale > abs(found.recorded) > 0 and found.groups == PER_STEP


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_checkpoint_the_steps_before_it_are_trained_again(copy_of, replayed, ranks):
    directory = copy_of(ranks)
    shutil.rmtree(directory.checkpoints)
    found = replayed(directory, STEPS)
    assert found.agrees and found.retrained == 2 and found.started_from == "the starting model"


def test_a_step_before_every_checkpoint_starts_from_the_starting_model(run_of, replayed):
    found = replayed(run_of(1), 1)
    assert found.recomputed == found.recorded and found.retrained == 0 and found.started_from == "the starting model"
    assert found.same_weights is None  # nobody wrote down the digest of version 0 here


def test_a_loss_that_is_not_the_recorded_one_differs(copy_of, replayed):
    directory = copy_of(1)
    lines = (directory.path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    row["learner/loss"] += 1e-4 * row["learner/loss_abs"]
    (directory.path / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")
    found = replayed(directory, STEPS)
    assert not found.agrees and found.difference == pytest.approx(1e-4)
    assert replayed(directory, STEPS, tolerance=1e-3).agrees


def test_a_policy_one_step_short_is_far_from_agreeing(run_of, model_of_two_layers, tmp_path):
    """What the tolerance must tell from rounding: the loss under the weights of another version."""
    directory = run_of(1)
    settings = settings_for(model_of_two_layers, tmp_path / "alone", **OPTIONS)
    plan = plan_replay(directory, STEPS)
    short = msgspec.structs.replace(plan_replay(directory, SAVED_STEP), checkpoint=None, steps=plan.steps[-1:])
    found = replay(short, directory, settings, TOLERANCE)
    assert found.difference > 100 * TOLERANCE


def test_an_archive_of_another_batch_is_refused_after_its_digest(copy_of, replayed):
    directory = copy_of(1)
    Archive(directory).write(STEPS, batch(STEPS)[::-1])
    with pytest.raises(ValueError, match=r"step_000003.parquet holds a batch of digest \w+, but .* trained step 3 on"):
        replayed(directory, STEPS)


def test_a_truncated_archive_is_refused(copy_of, replayed):
    directory = copy_of(1)
    path = Archive(directory).path_of(STEPS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="step_000003.parquet is damaged"):
        replayed(directory, STEPS)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(copy_of, replayed):
    directory = copy_of(1)
    folder = checkpoints.folder_of(directory.checkpoints, SAVED_STEP)
    shard = next((folder / "state").glob("*.distcp"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    plan = plan_replay(directory, STEPS)
    assert plan.checkpoint is None and "is damaged" in plan.passed_over[0]
    assert replayed(directory, STEPS).agrees


def test_what_is_shown_has_both_losses_and_a_verdict(run_of, replayed):
    found = replayed(run_of(1), STEPS)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(found))
    console.print(render(msgspec.structs.replace(found, recomputed=math.nan, same_weights=None, retrained=1)))
    text = console.export_text()
    assert repr(found.recorded) in text and "agrees" in text and "bit for bit" in text
    assert "differs" in text and "1 steps trained again" in text


def with_tokenizer(model_dir: str) -> None:
    """A tokenizer that knows no word, and a chat template: what the command needs beside the model."""
    words = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model_dir)


@pytest.fixture
def configured(copy_of, model_of_two_layers):
    """A run with the config that it was made by."""
    with_tokenizer(model_of_two_layers)
    directory = copy_of(1)
    changes = {"model.path": model_of_two_layers, "model.device": "cpu", "model.max_context_tokens": 24}
    changes |= {"rollout.max_tokens": 9, "rollout.temperature": 0.8, "rollout.group_size": 4}
    changes |= {f"learner.{name}": value for name, value in OPTIONS.items()} | {"learner.groups_per_step": PER_STEP}
    config = load_config("smoke", [f"{name}={value}" for name, value in changes.items()])
    directory.config.write_text(dump_config(config))
    return directory


def test_the_command_says_whether_the_losses_agree_by_its_exit_status(configured):
    run = str(configured.path)
    agrees = CliRunner().invoke(application, ["replay", run, "--step", "3"])
    assert agrees.exit_code == 0 and "from step_000002" in agrees.output and "agrees" in agrees.output, agrees.output
    path = configured.path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"learner/loss": -', '"learner/loss": '))
    differs = CliRunner().invoke(application, ["replay", run, "--step", "3"])
    assert differs.exit_code == 1 and "differs" in differs.output


def test_a_replay_leaves_the_run_as_it_is(configured):
    def content():
        return {path: path.stat().st_mtime_ns for path in configured.path.rglob("*")}

    before = content()
    assert CliRunner().invoke(application, ["replay", str(configured.path), "--step", "2"]).exit_code == 0
    assert content() == before


def test_the_command_refuses_bad_input_before_it_loads_a_model(configured, monkeypatch):
    monkeypatch.setattr("rl.launch.resolve_model", None)
    refused = {"9": "has recorded no step 9: it stands at step 3", "3": "step_000003.parquet does not exist"}
    Archive(configured).path_of(3).unlink()
    for step, told in refused.items():
        found = CliRunner().invoke(application, ["replay", str(configured.path), "--step", step])
        assert found.exit_code == 2 and told in found.output and "Traceback" not in found.output


def test_a_step_whose_loss_was_not_recorded_cannot_be_compared(copy_of):
    directory = copy_of(1)
    path = directory.path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"learner/loss":', '"old":'))
    with pytest.raises(ValueError, match="step 3 has no learner/loss in the run's records"):
        plan_replay(directory, STEPS)
