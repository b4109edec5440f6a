"""This file keeps a policy on disk: sharded state that any number of ranks can load, and a Hugging Face export.

Both are written under a temporary name and renamed when complete: what an interrupted write leaves is never taken for
a checkpoint, and the one before it stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf")
Extra = dict[str, dict[str, Tensor]]

SLACK_BYTES = 1 << 20  # headers and metadata


def save_state(directory: str, state: dict[str, Any], needed: int, group: dist.ProcessGroup) -> None:
    """Write what `state_of` gives, or a copy of it. A collective of `group`; replaces `directory` if it exists.

    needed is what all ranks write together, in bytes.

    Raises:
        OSError: the disk cannot hold it (errno ENOSPC): with the path, what is needed, what is free.
    """
    with _replacing(directory, needed, group) as partial:
        dcp.save(state, checkpoint_id=partial, process_group=group)


def load_state(directory: str, model: PreTrainedModel, optimizer: torch.optim.AdamW, extra: Extra | None = None) -> int:
    """Read what save_state wrote, whatever the number of ranks that wrote it; returns the step count. A collective.

    extra are the tensors that state_of was given, to be filled in place.

    Raises ValueError where there is no complete checkpoint, or one of another model.
    """
    if not os.path.isfile(os.path.join(directory, ".metadata")):
        raise ValueError(f"{directory} holds no complete checkpoint; name a directory under checkpoints/ that does")
    state = state_of(model, optimizer, 0, extra)
    try:
        dcp.load(state, checkpoint_id=directory)
    except CheckpointException as error:
        raise ValueError(
            f"the checkpoint {directory} does not fit this model ({_root_cause(error)}); "
            "resume with the model.path and algorithm.kl that the run was started with"
        ) from error
    for moments in optimizer.state.values():
        moments["step"].copy_(state["steps_done"])
    torch.set_rng_state(state["random_state"])
    return int(state["steps_done"])


def export_model(directory: str, model_dir: str, tensors: dict[str, Tensor]) -> None:
    """Write a Hugging Face directory: these weights, and configuration and tokenizer of the model they started from.

    Read back and compared before it gets its name. One process does this. Raises OSError as save_state does.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with _replacing(directory, needed) as partial:
        shutil.copytree(model_dir, partial, ignore=shutil.ignore_patterns(*WEIGHT_FILES), dirs_exist_ok=True)
        _set_dtype(pathlib.Path(partial, "config.json"), next(iter(tensors.values())).dtype)
        weights = os.path.join(partial, "model.safetensors")
        save_file(tensors, weights, metadata={"format": "pt"})
        reloaded = load_file(weights)
        different = [name for name in tensors if name not in reloaded or not torch.equal(tensors[name], reloaded[name])]
        if different or len(reloaded) != len(tensors):
            raise OSError(f"{weights} does not read back as it was written: {', '.join(different[:5])}; check the disk")


def state_of(
    model: PreTrainedModel, optimizer: torch.optim.AdamW, steps_done: int, extra: Extra | None = None
) -> dict[str, Any]:
    """All that a learner goes on from. The live tensors, sharded as they are: loading fills them in place.

    extra are parts beyond the policy, by name, such as a moving reference; empty ones are left out.
    """
    parameters = dict(model.named_parameters())
    every_name = dict(model.named_parameters(remove_duplicate=False)).keys()  # a tied head's too, which is saved once
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in every_name}
    state = {
        "model": {name: parameter.detach() for name, parameter in parameters.items()},
        "exp_avg": {name: optimizer.state[parameter]["exp_avg"] for name, parameter in parameters.items()},
        "exp_avg_sq": {name: optimizer.state[parameter]["exp_avg_sq"] for name, parameter in parameters.items()},
        "steps_done": torch.tensor(steps_done),
        "random_state": torch.get_rng_state(),
    }
    return state | {name: part for name, part in ({"buffers": buffers} | (extra or {})).items() if part}


@contextlib.contextmanager
def _replacing(directory: str, needed: int, group: dist.ProcessGroup | None = None) -> Iterator[str]:
    """A temporary directory that takes the place of `directory` at the end, if all went well.

    group: all its ranks are in here; the first of them creates, renames and removes, and they fail together.
    """
    partial = f"{directory}.partial"
    leads = group is None or dist.get_rank(group) == 0
    free = 0

    def prepare() -> None:
        nonlocal free
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)
        free = shutil.disk_usage(_existing(directory)).free
        if free < needed + SLACK_BYTES:
            raise OSError(errno.ENOSPC, "no space left")

    def replace() -> None:
        if leads:
            shutil.rmtree(directory, ignore_errors=True)
            os.rename(partial, directory)

    try:
        _together(prepare, group)
        yield partial
        _together(replace, group)
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
        if _is_full(error):
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: a checkpoint needs {needed:,} bytes, free were {free:,}; nothing was replaced. "
                "Free some space, or point run.dir at another disk",
                directory,
            ) from error
        if isinstance(error, CheckpointException):  # a BaseException, which would pass every handler above us
            raise RuntimeError(f"the checkpoint {directory} could not be written: {_root_cause(error)}") from error
        raise


def _together(action: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Do something on every rank of the group, or fail on every rank: none goes on to wait for one that failed."""
    failure: OSError | None = None
    try:
        action()
    except OSError as error:
        failure = error
    if group is not None:
        failures: list[OSError | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, failure, group=group)
        failure = failure or next((each for each in failures if each is not None), None)
    if failure is not None:
        raise failure


def _existing(directory: str) -> pathlib.Path:
    """The directory, or the nearest one above it that exists."""
    path = pathlib.Path(directory).absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _is_full(error: BaseException) -> bool:
    return getattr(_root_cause(error), "errno", None) == errno.ENOSPC or "No space left" in str(_root_cause(error))


def _root_cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed; torch wraps it."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error.__cause__ or error.__context__ or error


def _set_dtype(config: pathlib.Path, dtype: torch.dtype) -> None:
    """Make the exported configuration name the dtype of the exported weights."""
    settings = json.loads(config.read_text())
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2) + "\n")
