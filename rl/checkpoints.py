"""This file says which checkpoints are whole: a folder per step, a digest of every file, and a marker written last.

A folder without its marker is not a checkpoint: a crash left it, and the next save of that step replaces it. The marker
holds everything but the learners' tensors that a run needs to go on. A second root, in shared memory, may hold a newer
copy for when a learner rank dies; it obeys the same rules.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from rl.recorder import write_atomically

MARKER = "complete.json"
HASHING_THREADS = 4  # hashing lets other threads run; more than the disk can feed would only disturb the trainer


class FileDigest(msgspec.Struct, frozen=True):
    """One file as it was when the checkpoint was completed: its size and the BLAKE2b-128 of its bytes."""

    bytes: int
    digest: str


class Manifest(msgspec.Struct, frozen=True):
    """The marker of a checkpoint, written last.

    state is the driver's sampling state, anything that JSON can hold. files are those of the folder by relative path,
    which `complete` fills in.
    """

    run_id: str
    step: int
    version: int
    state: dict[str, Any] = {}
    files: dict[str, FileDigest] = {}


def folder_of(checkpoints: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step_{step:06d}"


def begin(folder: pathlib.Path) -> None:
    """Call before a save into `folder`: while it is written anew it must not pass for what it held before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    _sync_folder(folder)


def complete(folder: pathlib.Path, manifest: Manifest) -> Manifest:
    """Declare a checkpoint whole; returns the manifest with the digest of every file. From here on a resume may use it.

    Takes as long as reading all files; give it a thread. Everything is on the disk before the marker is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = _files_in(folder)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(folder / name, sync=True), names))
    for below in {folder, *((folder / name).parent for name in names)}:
        _sync_folder(below)
    manifest = msgspec.structs.replace(manifest, files=dict(zip(names, digests, strict=True)))
    # the standard library's json: generators of random numbers have integers of more than 64 bits
    text = json.dumps(msgspec.to_builtins(manifest))
    write_atomically(folder / MARKER, json.dumps({"digest": _digest_of(text), "manifest": text}))
    _sync_folder(folder)
    _sync_folder(folder.parent)
    return manifest


def verify(folder: pathlib.Path, manifest: Manifest) -> None:
    """Compare every file with its digest; takes as long as `complete`.

    Raises:
        ValueError: a file is missing or differs: which, both digests, and which checkpoint to resume from instead.
    """
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        problems = list(pool.map(lambda item: _problem(folder / item[0], item[1]), sorted(manifest.files.items())))
    damaged = [problem for problem in problems if problem]
    if damaged:
        raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(damaged[:5])}. {_instead_of(folder)}")


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """The marker of a checkpoint; None where it is missing.

    Raises:
        ValueError: the marker is there but unreadable, which no crash of ours leaves behind.
    """
    marker = folder / MARKER
    try:
        content = json.loads(marker.read_bytes())
        text, digest = content["manifest"], content["digest"]
        if _digest_of(text) != digest:
            raise ValueError(f"its digest is {_digest_of(text)}, it says {digest}")
        return msgspec.convert(json.loads(text), Manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # msgspec's errors are ValueErrors
        raise ValueError(
            f"checkpoint {folder} has an unreadable marker ({error!r}). {_instead_of(folder)}, or remove the folder"
        ) from error


def whole_checkpoints(checkpoints: pathlib.Path) -> list[tuple[pathlib.Path, Manifest]]:
    """The complete checkpoints, oldest first. Raises ValueError for a marker that is unreadable."""
    found = [(folder, read_manifest(folder)) for folder in _step_folders(checkpoints)]
    return [(folder, manifest) for folder, manifest in found if manifest is not None]


def newest_of(roots: Iterable[pathlib.Path], run_id: str) -> tuple[pathlib.Path, Manifest] | None:
    """The newest complete checkpoint of a run below any of the roots, of equals that of the first root; or None.

    Digests are not looked at: call `verify`.

    Raises:
        ValueError: the newest is of another run, or a marker is unreadable.
    """
    found = [checkpoint for root in roots for checkpoint in whole_checkpoints(root)]
    newest = max(found, key=lambda checkpoint: checkpoint[1].step, default=None)  # the first of equals
    if newest is not None:
        _check_owner(*newest, run_id)
    return newest


def newest_checkpoint(
    checkpoints: pathlib.Path, run_id: str | None = None, step: int | None = None
) -> tuple[pathlib.Path, Manifest]:
    """The checkpoint that a resume starts from: the newest complete one, or that of `step`. Digests are not looked at.

    Raises:
        ValueError: there is none, none of that step, or it is of another run than `run_id`.
    """
    if step is None:
        found = whole_checkpoints(checkpoints)
    else:
        manifest = read_manifest(folder_of(checkpoints, step))
        found = [(folder_of(checkpoints, step), manifest)] if manifest is not None else []
    if not found:
        raise ValueError(_none_found(checkpoints, step))
    folder, manifest = found[-1]
    if run_id is not None:
        _check_owner(folder, manifest, run_id)
    return folder, manifest


def retire(checkpoints: pathlib.Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and incomplete ones older than those."""
    kept = {folder for folder, _ in whole_checkpoints(checkpoints)[-keep:]}
    for folder in _step_folders(checkpoints):
        if kept and folder not in kept and folder < max(kept):
            discard(folder)


def discard(folder: pathlib.Path) -> None:
    """Remove a checkpoint, its marker first: one that a crash leaves half removed must not pass for whole."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.is_dir():
        _sync_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def discard_after(checkpoints: pathlib.Path, step: int) -> list[int]:
    """Remove what is newer than `step`, from which a run goes on another way; returns the steps of complete ones."""
    newer = [folder for folder in _step_folders(checkpoints) if folder.name > folder_of(checkpoints, step).name]
    steps = [int(folder.name.removeprefix("step_")) for folder in newer if (folder / MARKER).exists()]
    for folder in reversed(newer):
        discard(folder)
    return steps


def _step_folders(checkpoints: pathlib.Path) -> list[pathlib.Path]:
    """Oldest first."""
    return sorted(folder for folder in checkpoints.glob("step_*") if folder.is_dir() and folder.name[5:].isdigit())


def _files_in(folder: pathlib.Path) -> list[str]:
    """Relative paths of what belongs to a checkpoint, without its marker and what an interrupted write left."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in found if not any(part.endswith(".partial") for part in path.parts)]
    return sorted(path.as_posix() for path in kept if path != pathlib.Path(MARKER))


def _digest_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(path: pathlib.Path, sync: bool = False) -> FileDigest:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return FileDigest(file.tell(), digest)


def _problem(path: pathlib.Path, expected: FileDigest) -> str | None:
    name = f"{path.parent.name}/{path.name}"
    try:
        found = _digest(path)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    if found == expected:
        return None
    return (
        f"{name} has {found.bytes:,} bytes and digest {found.digest}, "
        f"the manifest says {expected.bytes:,} and {expected.digest}"
    )


def _marked_steps(checkpoints: pathlib.Path) -> list[int]:
    marked = (folder.name for folder in _step_folders(checkpoints) if (folder / MARKER).exists())
    return [int(name.removeprefix("step_")) for name in marked]


def _instead_of(folder: pathlib.Path) -> str:
    """What to do where a checkpoint is no good."""
    others = [step for step in _marked_steps(folder.parent) if folder_of(folder.parent, step) != folder]
    if not others:
        return "There is no other complete checkpoint; start the run anew with rl run"
    earlier = [step for step in others if folder_of(folder.parent, step) < folder]
    run = folder.parent.parent
    return f"Resume from the one before: rl resume {run} --step {max(earlier or others)} ({_listed(others)})"


def _none_found(checkpoints: pathlib.Path, step: int | None) -> str:
    steps = _marked_steps(checkpoints)
    if step is None:
        return f"{checkpoints} holds no complete checkpoint to resume from; start the run anew with rl run"
    fix = f"choose another ({_listed(steps)})" if steps else "there is no other; start the run anew with rl run"
    return f"{checkpoints} holds no complete checkpoint of step {step}; {fix}"


def _check_owner(folder: pathlib.Path, manifest: Manifest, run_id: str) -> None:
    if manifest.run_id != run_id:
        raise ValueError(
            f"checkpoint {folder} belongs to run {manifest.run_id!r}, not to {run_id!r}; resume that run, or give the "
            "run's folder the name that the checkpoint was written under"
        )


def _listed(steps: list[int]) -> str:
    return f"complete: {', '.join(map(str, steps))}"


def _sync_folder(folder: pathlib.Path) -> None:
    """Have the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
