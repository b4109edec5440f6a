"""This file takes a run up again after a stop or a crash at any moment, from what Redis, ledger and archive hold.

Redis knows most: the draws that were never finished, the groups that wait, those leased, and the driver's own state as
of its last act. The checkpoint says which steps are saved, the ledger which groups every step took, the archive what
those groups held. Where Redis is gone or a second short, the others fill in, and what nobody has is counted as aborted.
"""

from __future__ import annotations

import asyncio
import json

import msgspec

from rl.accounting import USEFUL_TOKENS
from rl.checkpoints import Manifest
from rl.codec import entry_of
from rl.parts import Parts
from rl.sampling import Sampler
from rl.saving import Saver


class TakenUp(msgspec.Struct, frozen=True, kw_only=True):
    """What a resumed run found. redis_was_empty: the buffer's data is gone, and with it what had not been trained."""

    step: int
    redelivered_steps: int
    waiting_groups: int
    sampled_again: int
    written_off: int
    redis_was_empty: bool


async def take_up(parts: Parts, sampler: Sampler, saver: Saver, manifest: Manifest) -> TakenUp:
    """Bring buffer, gate, curriculum, prompts and metrics to where the checkpoint and everything since then stand."""
    buffer, ledger = parts.buffer, parts.recorder.read_ledger()
    kept = await buffer.read_state()
    sampler.load_state(json.loads(kept) if kept is not None else manifest.state)
    drawn = [number_of(group_id) for group_ids in ledger.values() for group_id in group_ids]
    sampler.next_draw = max(sampler.next_draw, *(number + 1 for number in drawn), 0)
    await _settle_steps(parts, saver, ledger, manifest.step, kept is None)
    holdings = await buffer.holdings()
    unfinished = await buffer.drawn()
    waiting = [entry.group_id for entry in holdings.waiting]
    sampler.take_up(waiting, unfinished)
    for group in await buffer.fetch(sampler.unseen((*waiting, *holdings.leased))):
        sampler.see(group)
    written_off = await buffer.write_off(sampler.next_draw)
    counts = await buffer.stats()
    parts.gate.resume(counts.trained_groups + counts.leased_groups + counts.buffered_groups)
    parts.recorder.rewind(manifest.step)
    parts.account.take_up(parts.recorder.read_metric(USEFUL_TOKENS))
    found = TakenUp(
        step=manifest.step,
        redelivered_steps=max(ledger, default=0) - manifest.step,
        waiting_groups=len(waiting),
        sampled_again=len(unfinished),
        written_off=written_off,
        redis_was_empty=kept is None,
    )
    parts.recorder.event("resume", **msgspec.to_builtins(found))
    return found


def number_of(group_id: str) -> int:
    """The draw that a group id names."""
    return int(group_id.rpartition("/")[2])


async def _settle_steps(
    parts: Parts, saver: Saver, ledger: dict[int, tuple[str, ...]], start_step: int, redis_was_empty: bool
) -> None:
    """Commit what a saved step trained on, and lease what later steps will: the crash may have come in between."""
    buffer = parts.buffer
    holdings = await buffer.holdings()
    live = {entry.group_id for entry in holdings.waiting} | holdings.leased.keys()
    for step, group_ids in sorted(ledger.items()):
        if step > start_step:
            await saver.redeliver(step, group_ids)
            continue
        uncommitted = [group_id for group_id in group_ids if group_id in live]
        if uncommitted:
            await buffer.commit(await buffer.lease_exactly(step, uncommitted))
        elif redis_was_empty and parts.archive.holds(step):
            groups = await asyncio.to_thread(parts.archive.read, step)
            await buffer.commit([entry_of(group, 0) for group in groups])
    await buffer.confirm_leases(start_step)
