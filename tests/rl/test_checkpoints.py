"""This file tests rl/checkpoints.py: which checkpoints count, which stay, and how damage is told."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from rl import checkpoints as module
from rl.checkpoints import (
    MARKER,
    Manifest,
    begin,
    complete,
    discard,
    discard_after,
    folder_of,
    newest_checkpoint,
    newest_of,
    read_manifest,
    retire,
    verify,
    whole_checkpoints,
)


def make(checkpoints, step, whole=True, run_id="run", state=None):
    folder = folder_of(checkpoints, step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "__0_0.distcp").write_bytes(f"weights of step {step}".encode())
    (folder / "config.json").write_text("{}")
    if whole:
        complete(folder, Manifest(run_id, step, step, state or {}))
    return folder


def names(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir())


def test_a_checkpoint_without_its_marker_is_not_resumed_from(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 4, whole=False)
    folder, manifest = newest_checkpoint(tmp_path)
    assert folder.name == "step_000002" and manifest.step == 2


def test_a_run_without_a_complete_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint to resume from; start the run anew"):
        newest_checkpoint(tmp_path / "never")
    with pytest.raises(ValueError, match="no complete checkpoint of step 3; there is no other"):
        newest_checkpoint(tmp_path, step=3)
    assert newest_of([tmp_path, tmp_path / "never"], "run") is None


def test_a_step_can_be_asked_for_and_one_that_is_not_there_is_told_with_those_that_are(tmp_path):
    for step in (2, 4):
        make(tmp_path, step)
    assert newest_checkpoint(tmp_path, step=2)[1].step == 2
    with pytest.raises(ValueError, match=r"of step 3; choose another \(complete: 2, 4\)"):
        newest_checkpoint(tmp_path, step=3)


def test_the_newest_of_several_roots_is_found_and_of_equals_that_of_the_first(tmp_path):
    disk, memory = tmp_path / "disk", tmp_path / "memory"
    make(disk, 2)
    newer = make(memory, 3)
    assert newest_of([disk, memory], "run")[0] == newer
    same = make(disk, 3)
    assert newest_of([disk, memory], "run")[0] == same


def test_old_checkpoints_go_and_a_newer_incomplete_one_is_not_touched(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 5, whole=False)
    make(tmp_path, 8, whole=False)
    retire(tmp_path, keep=2)
    assert names(tmp_path) == ["step_000004", "step_000006", "step_000008"]


def test_nothing_is_retired_where_nothing_is_complete(tmp_path):
    make(tmp_path, 2, whole=False)
    retire(tmp_path, keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_what_half_a_removal_leaves_is_no_checkpoint(tmp_path, monkeypatch):
    make(tmp_path, 2)
    last = make(tmp_path, 4)
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # killed before it came to the files
    discard(last)
    assert newest_checkpoint(tmp_path)[1].step == 2


def test_a_folder_that_is_written_anew_is_no_checkpoint_until_it_is_complete_again(tmp_path):
    make(tmp_path, 2)
    folder = make(tmp_path, 4)
    begin(folder)
    assert newest_checkpoint(tmp_path)[1].step == 2
    complete(folder, Manifest("run", 4, 4))
    assert newest_checkpoint(tmp_path)[1].step == 4


def test_what_is_newer_than_the_step_gone_back_to_is_removed(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 5, whole=False)
    assert discard_after(tmp_path, 2) == [4, 6]
    assert names(tmp_path) == ["step_000002"]


@pytest.mark.parametrize("text", ["{", "[]", '{"digest": "0", "manifest": "{}"}', '{"digest": 1, "manifest": 2}', ""])
def test_an_unreadable_marker_names_the_folder_and_a_way_out(tmp_path, text):
    make(tmp_path, 2)
    (make(tmp_path, 4) / MARKER).write_text(text)
    with pytest.raises(ValueError, match=r"step_000004 has an unreadable marker .*rl resume .* --step 2"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path, step=2)[1].step == 2


def test_a_flipped_bit_in_the_state_of_a_marker_is_noticed(tmp_path):
    folder = make(tmp_path, 2, state={"cursor": 71})
    content = json.loads((folder / MARKER).read_text())
    content["manifest"] = content["manifest"].replace("71", "79")
    (folder / MARKER).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unreadable marker"):
        read_manifest(folder)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    make(tmp_path, 2, run_id="theirs")
    with pytest.raises(ValueError, match="belongs to run 'theirs', not to 'ours'"):
        newest_checkpoint(tmp_path, "ours")
    with pytest.raises(ValueError, match="belongs to run 'theirs', not to 'ours'"):
        newest_of([tmp_path], "ours")
    assert newest_checkpoint(tmp_path, "theirs")[1].step == 2


def test_the_drivers_state_comes_back_as_it_was_with_integers_of_any_size(tmp_path):
    state = {"random": 1 << 127, "generator": list(random.Random(1).getstate()[1]), "rate": 0.1 + 0.2, "name": "ü"}
    make(tmp_path, 2, state=state)
    assert newest_checkpoint(tmp_path)[1].state == state


def test_every_file_is_in_the_manifest_but_what_an_interrupted_write_left(tmp_path):
    folder = make(tmp_path, 2, whole=False)
    (folder / "export.partial").mkdir()
    (folder / "export.partial" / "model.safetensors").write_bytes(b"half")
    manifest = complete(folder, Manifest("run", 2, 2))
    assert sorted(manifest.files) == ["config.json", "state/__0_0.distcp"]
    assert manifest.files["state/__0_0.distcp"].bytes == len("weights of step 2")
    assert read_manifest(folder) == manifest
    shutil.rmtree(folder / "export.partial")
    verify(folder, manifest)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda file: file.write_bytes(b"weights of step 5"),
            r"state/__0_0.distcp has 17 bytes and digest \w{32}",
        ),
        (lambda file: file.write_bytes(b"weights"), r"has 7 bytes and digest \w{32}, the manifest says 17 and \w{32}"),
        (lambda file: file.unlink(), "state/__0_0.distcp is missing"),
    ],
    ids=["changed", "truncated", "missing"],
)
def test_a_damaged_file_is_named_with_both_digests_and_the_checkpoint_to_resume_from(tmp_path, damage, told):
    checkpoints = tmp_path / "runs" / "one" / "checkpoints"
    for step in (2, 4, 6):
        make(checkpoints, step)
    folder, manifest = newest_checkpoint(checkpoints)
    damage(folder / "state" / "__0_0.distcp")
    with pytest.raises(ValueError, match=told) as caught:
        verify(folder, manifest)
    assert f"rl resume {tmp_path / 'runs' / 'one'} --step 4 (complete: 2, 4)" in str(caught.value)


def test_a_crash_before_the_marker_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    make(tmp_path, 2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 4)
    assert [manifest.step for _, manifest in whole_checkpoints(tmp_path)] == [2]
