"""Which checkpoints count, and which stay."""

import pytest

from rl.run_state import MARKER, Manifest, complete, folder_of, newest_checkpoint, retire


def make(checkpoints, step, whole=True):
    folder = folder_of(checkpoints, step)
    folder.mkdir(parents=True)
    if whole:
        complete(folder, Manifest("run", step, step))
    return folder


def test_a_checkpoint_without_its_marker_is_not_resumed_from(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 4, whole=False)
    folder, manifest = newest_checkpoint(tmp_path)
    assert folder.name == "step_000002" and manifest.step == 2


def test_a_run_without_a_complete_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        newest_checkpoint(tmp_path)


def test_old_checkpoints_go_and_a_newer_incomplete_one_is_not_touched(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 5, whole=False)
    make(tmp_path, 8, whole=False)
    retire(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000006", "step_000008"]


def test_an_unreadable_marker_names_the_folder(tmp_path):
    (make(tmp_path, 2) / MARKER).write_text("{")
    with pytest.raises(ValueError, match="step_000002 has an unreadable marker"):
        newest_checkpoint(tmp_path)
