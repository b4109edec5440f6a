"""This file says how a new policy version travels from learner to generator, and when its arrival is believed.

The learner describes what it sends (`WeightUpdate`), the generator what it received (`UpdateReceipt`), and `verify`
compares the two. The digests of a receipt are taken over the bytes that the engine was given, and the canary, a
sequence both sides score, shows that the engine computes with them.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from blake3 import blake3


class WeightUpdateError(RuntimeError):
    """A policy version did not arrive as it was sent."""


class TensorDigest(msgspec.Struct, frozen=True):
    """One parameter as it travels: Hugging Face name, dtype in torch's words ("bfloat16"), digest of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


class WeightUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """A policy version as the learner sends it.

    digest is `combined(tensors)`. canary_logprobs [C-1] are the learner's log-probabilities, in nats at temperature 1,
    of canary_token_ids [C] after the first. path is the safetensors file in the shared memory of `node`; None where
    the tensors travel by nccl. moved is False where the optimizer step changed no weight, so equal digests are right.

    delta_path is the file beside it that holds only what differs from version base_version, whose digest is
    base_digest; None where there is no base, or the delta would be no smaller. Generators on the node of the sender
    read the whole file in place, which is faster, unless delta_here. num_bytes and delta_bytes are the files' contents.
    """

    version: int
    backend: str
    tensors: tuple[TensorDigest, ...]
    digest: str
    canary_token_ids: tuple[int, ...]
    canary_logprobs: tuple[float, ...]
    path: str | None
    node: str
    num_bytes: int
    moved: bool = True
    base_version: int | None = None
    base_digest: str = ""
    delta_path: str | None = None
    delta_bytes: int = 0
    delta_here: bool = False

    def for_holder(self, held: WeightUpdate | None, node: str) -> WeightUpdate:
        """This update as a generator on `node` loads it, which holds `held`: path is the delta's where that serves."""
        wanted = self.delta_path is not None and (self.delta_here or node != self.node)
        if not wanted or held is None or held.digest != self.base_digest:
            return self
        return msgspec.structs.replace(self, path=self.delta_path)


class NcclGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Where sender and receivers meet for weights.backend nccl: rank 0 sends, engine i has the ranks 1 + i*workers...

    world_size is 1 + engines * workers, where workers are the devices of one engine (generators.tensor_parallel).
    """

    address: str
    port: int
    engines: int
    workers: int

    @property
    def world_size(self) -> int:
        """Sender and all engine workers together."""
        return 1 + self.engines * self.workers

    def rank_offset(self, engine: int) -> int:
        """The rank of the first worker of engine `engine`, counted from 0."""
        return 1 + engine * self.workers


class UpdateReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a generator holds after an update: the version its engine stamps, what it received, its canary scores.

    missing names the engine's parameters that no received tensor filled. seconds maps a phase (pause, load, resume,
    canary) to its wall time.
    """

    version: int
    tensors: tuple[TensorDigest, ...]
    missing: tuple[str, ...]
    canary_logprobs: tuple[float, ...]
    seconds: dict[str, float]
    generator: int


def digest_of(buffer: bytes | memoryview) -> str:
    """BLAKE3 of raw bytes, 128 bits in hexadecimal. A memoryview must be C-contiguous, such as `uint8_array.data`."""
    return blake3(buffer).hexdigest(length=16)


def combined(tensors: Iterable[TensorDigest]) -> str:
    """One digest for a whole set of tensors, whatever order they came in."""
    lines = sorted(f"{tensor.name} {tensor.dtype} {tensor.shape} {tensor.digest}" for tensor in tensors)
    return digest_of("\n".join(lines).encode())


def verify_tensors(
    sent: Iterable[TensorDigest],
    received: Iterable[TensorDigest],
    missing: Iterable[str] = (),
) -> None:
    """Raise WeightUpdateError, naming parameters, unless what was sent is what was received and nothing is missing."""
    sent_by_name = {tensor.name: tensor for tensor in sent}
    received_by_name = {tensor.name: tensor for tensor in received}
    lost = sorted(sent_by_name.keys() - received_by_name.keys())
    foreign = sorted(received_by_name.keys() - sent_by_name.keys())
    changed = [name for name, tensor in sorted(received_by_name.items()) if sent_by_name.get(name, tensor) != tensor]
    unfilled = sorted(missing)
    problems = {
        "sent but not received": lost,
        "received but not sent": foreign,
        "received with other bytes than were sent": changed,
        "in the engine but filled by no received tensor": unfilled,
    }
    found = [f"{what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise WeightUpdateError("the weights did not arrive as they were sent; " + "; ".join(found))


def verify(
    update: WeightUpdate,
    receipt: UpdateReceipt,
    previous: WeightUpdate | None,
    max_canary_gap: float,
) -> float:
    """Check a receipt against what was sent and return the canary's mean |difference| in nats.

    Raises WeightUpdateError for a missing, foreign or altered tensor, a version that did not move, weights equal to
    those of `previous` although the optimizer moved them, and a canary further off than `max_canary_gap`.
    """
    whom = f"generator {receipt.generator}, policy version {update.version}"
    try:
        verify_tensors(update.tensors, receipt.tensors, receipt.missing)
    except WeightUpdateError as error:
        raise WeightUpdateError(f"{whom}: {error}") from error
    if receipt.version != update.version:
        raise WeightUpdateError(f"{whom}: the engine still stamps its tokens with version {receipt.version}")
    if previous is not None and update.moved and previous.digest == update.digest:
        raise WeightUpdateError(
            f"{whom}: every weight equals version {previous.version}, although the optimizer moved; "
            f"the sender is frozen ({_some([tensor.name for tensor in update.tensors])})"
        )
    gap = canary_gap(update.canary_logprobs, receipt.canary_logprobs)
    if not gap <= max_canary_gap:
        raise WeightUpdateError(
            f"{whom}: the engine scores the canary {gap:.4f} nats from the learner on average, "
            f"allowed are {max_canary_gap} (weights.max_canary_gap); it does not compute with the weights it was sent"
        )
    return gap


def canary_gap(learner: tuple[float, ...], engine: tuple[float, ...]) -> float:
    """Mean |difference| in nats between two scorings [C-1] of the canary; not a number where either holds one."""
    if len(learner) != len(engine) or not learner:
        raise WeightUpdateError(f"the learner scored {len(learner)} canary tokens, the engine {len(engine)}")
    return sum(abs(ours - theirs) for ours, theirs in zip(learner, engine, strict=True)) / len(learner)


def _some(names: list[str]) -> str:
    """The first names of a list that may be hundreds long."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
