"""This file says which checkpoints are whole, and what a run needs besides weights to go on after a stop or a crash."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import msgspec

from rl.buffer import Buffer
from rl.recorder import Recorder, write_atomically

MARKER = "complete.json"


class Manifest(msgspec.Struct, frozen=True):
    """The marker of a checkpoint, written last: a folder without it is not a checkpoint."""

    run_id: str
    step: int
    version: int


def folder_of(checkpoints: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step_{step:06d}"


def complete(folder: pathlib.Path, manifest: Manifest) -> None:
    """Declare a checkpoint whole. From here on a resume may use it."""
    write_atomically(folder / MARKER, msgspec.json.encode(manifest).decode())


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """The marker of a checkpoint; None where it is missing.

    Raises:
        ValueError: the marker is there but unreadable, which no crash of ours leaves behind.
    """
    marker = folder / MARKER
    if not marker.exists():
        return None
    try:
        return msgspec.json.decode(marker.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ValueError(f"checkpoint {folder} has an unreadable marker ({error}); remove the folder") from error


def whole_checkpoints(checkpoints: pathlib.Path) -> list[tuple[pathlib.Path, Manifest]]:
    """The complete checkpoints, oldest first."""
    found = [(folder, read_manifest(folder)) for folder in sorted(checkpoints.glob("step_*")) if folder.is_dir()]
    return [(folder, manifest) for folder, manifest in found if manifest is not None]


def newest_checkpoint(checkpoints: pathlib.Path) -> tuple[pathlib.Path, Manifest]:
    """The checkpoint that a resume starts from.

    Raises:
        ValueError: there is none.
    """
    whole = whole_checkpoints(checkpoints)
    if not whole:
        raise ValueError(f"{checkpoints} holds no complete checkpoint to resume from; start the run anew with rl run")
    return whole[-1]


def retire(checkpoints: pathlib.Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and incomplete ones older than those."""
    kept = {folder for folder, _ in whole_checkpoints(checkpoints)[-keep:]}
    newest = max(kept)
    for folder in checkpoints.glob("step_*"):
        if folder not in kept and folder < newest:
            shutil.rmtree(folder)


def save_sampling_state(path: pathlib.Path, state: dict[str, Any]) -> None:
    """Keep, at every step, where prompts and beliefs stand: paid evidence outlives a crash of the policy."""
    write_atomically(path / "sampling_state.json", json.dumps(state))


def load_sampling_state(path: pathlib.Path) -> dict[str, Any]:
    """What `save_sampling_state` kept last."""
    return json.loads((path / "sampling_state.json").read_text())


async def reconcile(buffer: Buffer, recorder: Recorder, start_step: int) -> None:
    """Bring the buffer to where the checkpoint of `start_step` stands, after a stop or a crash at any moment.

    Leased groups of saved steps were trained: they are archived and committed now if the crash came in between. Those
    of later steps stay leased, to be redelivered from the ledger. Those in no ledger line were leased for a step that
    never began: they go back. What was being sampled is lost, and counted as aborted.
    """
    leased = {entry.group_id for entry in await buffer.leased()}
    ledger = recorder.read_ledger()
    for step, group_ids in sorted(ledger.items()):
        unsaved = [group_id for group_id in group_ids if group_id in leased]
        if step <= start_step and unsaved:
            recorder.archive(step, await buffer.fetch(unsaved))
            await buffer.commit(unsaved)
    in_ledger = {group_id for group_ids in ledger.values() for group_id in group_ids}
    await buffer.give_back(sorted(leased - in_ledger))
    aborted = await buffer.drop_in_flight("aborted")
    recorder.event("resume", step=start_step, aborted_groups=aborted, redelivered=max(ledger, default=0) - start_step)
