"""This file tests learners/checkpoint.py through the learner: resume, another number of ranks, export, a full disk."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learners import checkpoint
from learners.background_save import BackgroundSave
from rl.algorithm_config import AlgorithmSection
from tests.learners.tiny import (
    make_learner,
    order_of,
    random_group,
    run_ranks,
    save_tiny_llama,
    settings_for,
    weights_of,
    whole,
)

GROUPS = [random_group(index) for index in range(4)]
PULLED = AlgorithmSection.model_validate({"kl": {"coefficient": 0.1, "reference": "ema", "ema_decay": 0.9}})


@pytest.fixture
def model_of_two_layers(tmp_path):
    return save_tiny_llama(tmp_path / "model")


@pytest.fixture
def learner(model_of_two_layers, tmp_path):
    made = make_learner(settings_for(model_of_two_layers, tmp_path / "ranks", warmup_steps=4), GROUPS, dtype=None)
    yield made
    made.close()


def save(learner, folder, export=False):
    learner.begin_save(str(folder), export)
    learner.finish_save()


def pulled_learner(model_dir, folder, rank=0, world_size=1):
    """A learner with a moving reference, which a checkpoint must hold too."""
    settings = msgspec.structs.replace(settings_for(model_dir, folder, warmup_steps=4), algorithm=PULLED)
    return make_learner(settings, GROUPS, rank, world_size)


def both_weights(learner):
    return weights_of(learner), whole(learner._extra_state["reference"])


def go_on_with_two(rank, world_size, model_dir, folder):
    """From a checkpoint of step 2: a third step, a checkpoint, a fourth; runs in a process of its own."""
    learner = pulled_learner(model_dir, pathlib.Path(folder), rank, world_size)
    learner.load(f"{folder}/step_2/state")
    learner.step(order_of(GROUPS, step=3))
    learner.begin_save(f"{folder}/step_3", export=True)
    learner.step(order_of(GROUPS, step=4))  # its collectives and those of the writing thread run side by side
    weights = both_weights(learner)
    learner.finish_save()
    if rank == 0:
        torch.save(weights, f"{folder}/step_4.pt")
    learner.close()


def test_training_moves_from_one_rank_to_two_and_back_as_if_nothing_had_happened(model_of_two_layers, tmp_path):
    folder = tmp_path / "shared"
    learner = pulled_learner(model_of_two_layers, tmp_path / "one")
    try:
        expected = {}
        for step in (1, 2, 3, 4):
            learner.step(order_of(GROUPS, step=step))
            expected[step] = both_weights(learner)
            if step == 2:
                save(learner, folder / "step_2")
        run_ranks(go_on_with_two, 2, model_of_two_layers, str(folder))
        torch.testing.assert_close(torch.load(folder / "step_4.pt"), expected[4], rtol=1e-9, atol=1e-12)
        learner.load(str(folder / "step_3" / "state"))
        torch.testing.assert_close(both_weights(learner), expected[3], rtol=1e-9, atol=1e-12)
        exported = AutoModelForCausalLM.from_pretrained(folder / "step_3" / "export", dtype=torch.float64)
        for name, weight in weights_of(learner).items():
            assert torch.equal(exported.get_parameter(name), weight), name
        learner.step(order_of(GROUPS, step=4))
        torch.testing.assert_close(both_weights(learner), expected[4], rtol=1e-9, atol=1e-12)
    finally:
        learner.close()


@pytest.fixture
def slow_disk(monkeypatch):
    """An event without which nothing is written."""
    may_write, write = threading.Event(), checkpoint.save_state

    def wait_and_write(*arguments):
        assert may_write.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save_state", wait_and_write)
    return may_write


def test_training_goes_on_while_the_state_is_written_as_it_was(learner, tmp_path, slow_disk):
    learner.step(order_of(GROUPS))
    saved = weights_of(learner)
    learner.begin_save(str(tmp_path / "step_1"), export=True)
    for step in (2, 3):
        learner.step(order_of(GROUPS, step=step))
        if step == 2:
            expected = weights_of(learner)
    with pytest.raises(AssertionError, match="still being written"):
        learner.begin_save(str(tmp_path / "step_3"), export=False)
    assert not (tmp_path / "step_1").exists()
    slow_disk.set()
    learner.finish_save()
    exported = load_file(tmp_path / "step_1" / "export" / "model.safetensors")
    learner.load(str(tmp_path / "step_1" / "state"))
    for name, weight in weights_of(learner).items():
        assert torch.equal(weight, saved[name]) and torch.equal(exported[name], saved[name].bfloat16()), name
    learner.step(order_of(GROUPS, step=2))  # moments, step count and random state were those of step 1 too
    torch.testing.assert_close(weights_of(learner), expected, rtol=0, atol=0)


def test_every_save_copies_into_the_memory_of_the_first(learner, tmp_path):
    saves = BackgroundSave("", torch.float32, 60.0)
    weight = torch.zeros(8)
    places = set()
    for step in (1, 2):
        weight.fill_(step)
        saves.begin(str(tmp_path / f"step_{step}"), {"model": {"weight": weight}}, export=False)
        saves.finish()
        places.add(saves._copies["model/weight"].data_ptr())
    assert len(places) == 1 and weight.data_ptr() not in places
    with pytest.raises(AssertionError, match="no checkpoint is being written"):
        saves.finish()
    saves.close()


def test_a_loaded_learner_makes_the_very_steps_that_the_saved_one_made(learner, tmp_path):
    learner.step(order_of(GROUPS))
    save(learner, tmp_path / "step_1")
    learner.step(order_of(GROUPS, step=2))
    expected = weights_of(learner)
    learner.load(str(tmp_path / "step_1" / "state"))
    assert learner.step(order_of(GROUPS, step=2)).metrics["learner/lr"].value == pytest.approx(1e-2 / 2)
    torch.testing.assert_close(weights_of(learner), expected, rtol=0, atol=0)


def test_publishing_between_steps_does_not_disturb_what_is_saved(learner, tmp_path):
    learner.step(order_of(GROUPS))
    before = weights_of(learner)
    learner.publish(1)
    save(learner, tmp_path / "step_1")
    learner.step(order_of(GROUPS, step=2))
    learner.load(str(tmp_path / "step_1" / "state"))
    torch.testing.assert_close(weights_of(learner), before, rtol=0, atol=0)


def test_an_interrupted_write_is_not_a_checkpoint_and_the_next_write_replaces_it(learner, tmp_path):
    target = tmp_path / "step_1"
    (target / "state.partial").mkdir(parents=True)
    (target / "state.partial" / "__0_0.distcp").write_bytes(b"half")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        learner.load(str(target / "state"))
    save(learner, target)
    save(learner, target)
    assert [path.name for path in target.iterdir()] == ["state"]
    learner.load(str(target / "state"))


def test_a_checkpoint_of_another_model_is_refused(learner, tmp_path):
    save(learner, tmp_path / "step_1")
    learner.close()
    other = save_tiny_llama(tmp_path / "other", tied=False)
    wider = make_learner(settings_for(other, tmp_path / "again"), GROUPS, dtype=None)
    try:
        with pytest.raises(ValueError, match="does not fit this model"):
            wider.load(str(tmp_path / "step_1" / "state"))
    finally:
        wider.close()


def test_an_export_reloads_with_transformers_and_holds_the_learners_weights(learner, model_of_two_layers, tmp_path):
    pathlib.Path(model_of_two_layers, "tokenizer.json").write_text("{}")
    learner.step(order_of(GROUPS))
    save(learner, tmp_path, export=True)
    assert (tmp_path / "export" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    for name, weight in weights_of(learner).items():
        assert torch.equal(dict(model.named_parameters())[name], weight.bfloat16()), name


def test_an_export_that_reads_back_differently_is_an_error_and_does_not_get_its_name(
    model_of_two_layers, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "load_file", lambda path: {"a": torch.zeros(2)})
    with pytest.raises(OSError, match="does not read back as it was written: a"):
        checkpoint.export_model(str(tmp_path / "export"), model_of_two_layers, {"a": torch.ones(2)})
    assert not (tmp_path / "export").exists() and not (tmp_path / "export.partial").exists()


def test_a_disk_known_to_be_too_full_is_refused_before_a_byte_is_written(
    learner, model_of_two_layers, tmp_path, monkeypatch
):
    save(learner, tmp_path / "step_1")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 4096))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, free were 4,096.*step_2") as caught:
        save(learner, tmp_path / "step_2", export=True)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, free were 4,096.*export"):
        checkpoint.export_model(str(tmp_path / "export"), model_of_two_layers, {"a": torch.zeros(4096)})
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("step_*/*")) == ["step_1/state"]
    learner.step(order_of(GROUPS))  # training goes on
    learner.load(str(tmp_path / "step_1" / "state"))


def save_on_a_full_disk(model_dir: str, disk: str) -> None:
    """Runs in a namespace where `disk` is a tmpfs of 2 MiB that lies about its free space."""
    folder = pathlib.Path(disk).parent
    learner = make_learner(settings_for(model_dir, folder / "ranks"), GROUPS, dtype=None)
    save(learner, f"{disk}/step_1")
    with open(f"{disk}/filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    checkpoint.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 1 << 40)
    big = {"a": torch.zeros(1 << 22, dtype=torch.uint8)}  # the configuration fits, the weights do not
    os.truncate(f"{disk}/filler", os.path.getsize(f"{disk}/filler") - (1 << 16))
    for write in (lambda path: save(learner, path), lambda path: checkpoint.export_model(path, model_dir, big)):
        try:
            write(f"{disk}/step_1/again")
        except OSError as error:
            assert error.errno == errno.ENOSPC and "the disk is full" in str(error), error
        else:
            raise AssertionError("a full disk took a checkpoint")
    assert sorted(os.listdir(f"{disk}/step_1")) in (["state"], ["again", "state"]), os.listdir(f"{disk}/step_1")
    learner.step(order_of(GROUPS))  # training goes on
    learner.load(f"{disk}/step_1/state")
    learner.close()


def test_a_disk_that_fills_up_during_the_write_leaves_the_previous_checkpoint(model_of_two_layers, tmp_path):
    """A real ENOSPC, from a 2 MiB tmpfs in a mount namespace of its own; skipped where the kernel forbids those."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3" "$4" "$1"'
    code = "import sys; from tests.learners.test_checkpoint import save_on_a_full_disk as f; f(*sys.argv[1:])"
    enter = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*enter, f"mount -t tmpfs none {disk}"]).returncode:
        pytest.skip("this machine does not let us mount a small tmpfs")
    command = [*enter, inside, "sh", str(disk), sys.executable, code, model_of_two_layers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
