"""This file makes all generators of a run look like one that heals itself: route, deal, update, evaluate, scale.

What a generator had in hand when it died is given to another, or waits until it is back; nothing is lost with it.
`member.py` is the life of one generator, `generator_process.py` its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from actors.board import Board, FleetHooks
from actors.generator_process import FleetSettings, RayProcess
from actors.member import Launch, Member, MemberDied, Pace
from rl.crew import together
from rl.metrics import Metrics, last, total
from rl.orders import Draw, Graded, PartStatus
from rl.parts import GeneratorsLost
from rl.trajectory import GroupReport, Prompt
from rl.weights import NcclGroup, UpdateReceipt, WeightUpdate

TELL_TOGETHER_S = 0.05
MAX_LOSSES = 3  # generators that a draw, or a held-out prompt, may take with it before it is no longer tried

T = TypeVar("T")
Send = Callable[[int], Awaitable[None]]

__all__ = ["FleetHooks", "FleetSettings", "GeneratorFleet"]


class GeneratorFleet:
    """All generators of a run. Every call raises GeneratorsLost once none is left that works or may come back."""

    def __init__(self, launch: Launch, pace: Pace, board: Board, max_tokens: int, longest_first: bool = False) -> None:
        """longest_first deals a round out by what its draws are believed to take, not as it is given."""
        self.send: Send | None = None  # over nccl, the composition root says who broadcasts
        self._launch = launch
        self._pace = pace
        self._board = board
        self._max_tokens = max_tokens
        self._longest_first = longest_first
        self._members: list[Member] = []
        self._lives: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._met: frozenset[tuple[int, int]] = frozenset()
        self._requeued = 0
        self._lost: dict[tuple[int, str], list[str]] = {}  # of a generator and the reason, not told of yet
        self._update_seconds: dict[str, float] = {}

    @classmethod
    async def start(cls, settings: FleetSettings, count: int, hooks: FleetHooks) -> GeneratorFleet:
        """Start `count` generators side by side. Raises what the first failing one raised; then none is left."""
        pace = Pace(
            max_restarts=settings.max_restarts,
            heartbeat_deadline_s=settings.heartbeat_deadline_s,
            start_deadline_s=settings.start_deadline_s,
            leave_deadline_s=settings.leave_deadline_s,
        )
        board = Board(hooks, settings.generator.run_id)
        generator = settings.generator
        longest_first = generator.order == "longest_first"
        fleet = cls(functools.partial(RayProcess, settings), pace, board, generator.max_tokens, longest_first)
        await fleet.begin(count)
        return fleet

    async def begin(self, count: int) -> None:
        """The first start. From its end on, generators are restarted behind the calls."""
        self._members = [self._member(index) for index in range(count)]
        try:
            await together(*(member.begin() for member in self._members))
        except BaseException:
            await asyncio.gather(*(member.kill() for member in self._members))
            raise
        for member in self._members:
            self._own(member)

    def introduce(self, payload_of: Callable[[WeightUpdate], Any]) -> None:
        """Say where the bytes of an update come from, for generators on other nodes than its file."""
        self._board.payload_of = payload_of

    # Sampling

    async def rollout(self, draw: Draw) -> GroupReport:
        """Have the working generator with the least in hand sample a group; if it dies, another."""
        for _ in range(MAX_LOSSES):
            member = await self._until(self._least_loaded)
            try:
                return await member.sample("rollout", [draw])
            except MemberDied as death:
                self._requeue(member, [draw], death)
        self._abandon(draw)
        return _aborted(draw)

    async def rollout_round(self, draws: Sequence[Draw]) -> list[GroupReport]:
        """Deal draws out in turn, so that the same round reaches the same generators in every run.

        The reports come in the order of the draws. What a draw is believed to take was written down with it, so that a
        round which starts with the longest is dealt out alike after a restart too.
        """
        places = range(len(draws))
        if self._longest_first:
            places = sorted(places, key=lambda place: -draws[place].expected_tokens)
        reports = await self._deal("rollout_round", [draws[place] for place in places])
        return [report for _, report in sorted(zip(places, reports, strict=True), key=lambda pair: pair[0])]

    async def cut_tails(self, oldest_version: int) -> None:
        """Give up the groups that began before `oldest_version`, wherever they are; their rollouts tell of it.

        What waits for a generator has not begun, and what a death sent to another one began anew there.
        """
        busy = [member for member in self._members if member.state in ("working", "leaving")]
        await together(*(_told(member, oldest_version) for member in busy if member.workload.in_hand))

    async def evaluate(self, prompts: Sequence[Prompt], temperature: float, seed: int) -> list[Graded]:
        """Answer and judge held-out prompts, each once, over all generators."""
        return await self._deal("evaluate", prompts, temperature, self._max_tokens, seed)

    async def _deal(self, method: str, items: Sequence[Any], *arguments: Any) -> list[Any]:
        """Answers in the order of items. What a quarantined generator leaves undone is dealt out among the others.

        A hand whose generator died waits for that generator: the same items are then sampled together again, in the
        same order, which gives the same answers to the last bit.
        """
        answers: dict[int, Any] = {}
        losses = [0] * len(items)

        async def play(member: Member, places: list[int]) -> None:
            while places and await self._until(lambda: self._comes(member)) is member:
                try:
                    found = await member.sample(method, [items[place] for place in places], *arguments)
                    answers.update(zip(places, found, strict=True))
                    return
                except MemberDied as death:
                    self._requeue(member, [items[place] for place in places], death)
                for place in places:
                    losses[place] += 1
                lost = [place for place in places if losses[place] == MAX_LOSSES]
                answers.update({place: self._give_up(items[place]) for place in lost})
                places = [place for place in places if place not in answers]

        while undone := [place for place in range(len(items)) if place not in answers]:
            takers = await self._until(self._takers)
            hands = [(member, undone[turn :: len(takers)]) for turn, member in enumerate(takers)]
            await together(*(play(member, places) for member, places in hands if places))
        return [answers[place] for place in range(len(items))]

    def _least_loaded(self) -> Member | None:
        """By the tokens that are expected of what each has in hand; by its number, where that is unknown of any."""
        working = [member for member in self._members if member.state == "working"]
        known = all(member.workload.expected_tokens is not None for member in working)
        return min(working, key=lambda member: member.workload.load(known), default=None)

    def _takers(self) -> list[Member] | None:
        """Those a round is dealt to: who works, or did and is coming back. One that never worked may take minutes."""
        return [member for member in self._members if member.is_active and member.has_worked] or None

    def _comes(self, member: Member) -> Member | bool | None:
        """The member when it works, False when it never will, None while that is open."""
        if member.state == "working":
            return member
        return None if member.is_active else False

    def _requeue(self, member: Member, items: Sequence[Any], death: MemberDied) -> None:
        """Take note that items lost their generator; those of one death are told of in one event."""
        draws = [item.group_id for item in items if isinstance(item, Draw)]
        self._requeued += len(draws)
        if not self._lost:
            asyncio.get_running_loop().call_later(TELL_TOGETHER_S, self._tell_requeued)
        self._lost.setdefault((member.index, str(death)), []).extend(draws)

    def _tell_requeued(self) -> None:
        lost, self._lost = self._lost, {}
        for (generator, reason), groups in lost.items():
            if groups:
                self._board.hooks.on_event(
                    "draws_requeued", generator=generator, reason=reason, count=len(groups), groups=groups
                )

    def _give_up(self, item: Draw | Prompt) -> GroupReport | Graded:
        """The answer for an item that no generator survives."""
        self._abandon(item)
        return _aborted(item) if isinstance(item, Draw) else _unanswered(item, self._board.newest)

    def _abandon(self, item: Draw | Prompt) -> None:
        """Tell of an item that killed its generators, or was unlucky often enough to look like it."""
        prompt = item.prompt if isinstance(item, Draw) else item
        group_id = item.group_id if isinstance(item, Draw) else None
        self._board.hooks.on_event(
            "poison_prompt",
            generator=None,
            reason=f"{MAX_LOSSES} generators died while they had {prompt.prompt_id} in hand; it is no longer tried",
            prompt=prompt.prompt_id,
            group=group_id,
        )

    # Weights

    async def join(self, group: NcclGroup) -> None:
        """Have every generator meet the sender of the nccl backend; the group counts `receivers` engines."""
        members = self._over_nccl()
        await together(*(member.call("join", group, place) for place, member in enumerate(members)))
        self._met = _identities(members)

    @property
    def receivers(self) -> int:
        """Generators that take part in the next update over nccl: those that work, and those that came for it."""
        return len(self._over_nccl())

    async def update(self, update: WeightUpdate) -> list[UpdateReceipt]:
        """Have all working generators load a version; returns the receipts of those that did not die over it.

        Whoever is joining at this moment loads this version too before it works. Over nccl a member that died or came
        changes the group, which hooks.regroup must rebuild: written for it, but never run on GPUs yet.
        """
        members = [member for member in self._members if member.state == "working"]
        if update.path is None:
            members = self._over_nccl()
            if self._board.hooks.regroup is not None and self._met != _identities(members):
                await self._board.hooks.regroup()
                members = self._over_nccl()
        update = self._board.show(update)
        sending = [self.send(update.version)] if self.send is not None and members else []
        answers = await together(*(_given(member, update) for member in members), *map(_as_coroutine, sending))
        receipts = [receipt for receipt in answers[: len(members)] if receipt is not None]
        self._update_seconds = receipts[0].seconds if receipts else {}
        return receipts

    def _over_nccl(self) -> list[Member]:
        return [member for member in self._members if member.state in ("joining", "working")]

    # Coming, going, and how all stand

    async def scale(self, count: int) -> str:
        """Begin to start or end generators until `count` work; returns what was begun. Quarantined ones do not count.

        Raises:
            ValueError: for less than one.
        """
        if count < 1:
            raise ValueError(f"a run cannot have {count} generators; ask for at least 1, or stop the run")
        active = [member for member in self._members if member.is_active]
        going = active[count:]
        for member in going:
            member.leave()
        coming = [self._member(index) for index in self._free_indices(count - len(active))]
        kept = [member for member in self._members if member.index not in {each.index for each in coming}]
        self._members = sorted([*kept, *coming], key=lambda member: member.index)
        for member in coming:
            self._own(member)
        if going:
            return f"{_names(going)} will end, each when it has finished what it has in hand"
        if coming:
            return f"{_names(coming)} will start, load the newest weights, and work when those are verified"
        return f"there are {count} already; nothing to do"

    async def check(self) -> None:
        """Raise what ends the run: GeneratorsLost, or a failure of the supervision itself."""
        if self._failure is not None:
            raise self._failure
        if not any(member.is_active for member in self._members):
            reasons = "; ".join(f"{member.name}: {member.detail}" for member in self._members)
            raise GeneratorsLost(
                f"no generator is left that could be restarted ({reasons}); the logs of the generators say more, and "
                "generators.max_restarts allows more restarts in a row"
            )

    def describe(self) -> list[PartStatus]:
        """How each generator stands."""
        return [member.status() for member in self._members]

    def metrics(self) -> Metrics:
        """Since the last call: idle fraction of working time, draws given away; and the last update's seconds."""
        times = [member.workload.take_times() for member in self._members]
        working_s = sum(working for _, working in times)
        requeued, self._requeued = self._requeued, 0
        return {
            "generator/idle_fraction": last(sum(idle for idle, _ in times) / working_s if working_s else 0.0),
            "generators/working/count": last(sum(member.state == "working" for member in self._members)),
            "generators/restarts/count": last(sum(member.restarts for member in self._members)),
            "sampling/requeued/groups": total(requeued),
            **{f"weights/update/{phase}/s": last(seconds) for phase, seconds in self._update_seconds.items()},
        }

    async def close(self) -> None:
        """End every generator's processes, also of those that are just starting; no task is left."""
        lives = list(self._lives)
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        closed = await asyncio.gather(*(member.close() for member in self._members), return_exceptions=True)
        self._board.close()
        self._tell_requeued()
        for error in closed:
            if error is not None:
                raise error

    def _member(self, index: int) -> Member:
        return Member(index, self._launch, self._board, self._pace)

    def _free_indices(self, count: int) -> list[int]:
        """The lowest that nobody has; a quarantined generator's counts as free, and gets its next chance with it."""
        taken = {member.index for member in self._members if member.state != "quarantined"}
        return [index for index in range(len(taken) + max(0, count)) if index not in taken][: max(0, count)]

    def _own(self, member: Member) -> None:
        life = asyncio.create_task(member.live(), name=member.name)
        self._lives.add(life)
        life.add_done_callback(functools.partial(self._ended, member))

    def _ended(self, member: Member, life: asyncio.Task[None]) -> None:
        self._lives.discard(life)
        if not life.cancelled() and (error := life.exception()) is not None:
            error.add_note(f"in the life of {member.name}")
            self._failure = self._failure or error
        if member.state == "left":
            self._members = [each for each in self._members if each is not member]
        self._board.ring()

    async def _until(self, look: Callable[[], T | None]) -> T:
        """What `look` finds, as soon as it finds anything."""
        while True:
            await self.check()  # awaits nothing, so that no ring is missed between the look and the wait
            if (found := look()) is not None:
                return found
            await self._board.change()


async def _given(member: Member, update: WeightUpdate) -> UpdateReceipt | None:
    try:
        return await member.take(update)
    except MemberDied:
        return None  # it is restarted behind, and loads this version or a newer one before it works


async def _told(member: Member, oldest_version: int) -> None:
    with contextlib.suppress(MemberDied):  # what it had in hand is begun anew
        await member.call("cut_tails", oldest_version)


async def _as_coroutine(awaitable: Awaitable[T]) -> T:
    return await awaitable


def _identities(members: Sequence[Member]) -> frozenset[tuple[int, int]]:
    return frozenset((member.index, member.attempt) for member in members)


def _names(members: Sequence[Member]) -> str:
    return ", ".join(member.name for member in members)


def _aborted(draw: Draw) -> GroupReport:
    """The report of a draw that was given up: a group without answers."""
    return GroupReport(
        group_id=draw.group_id,
        draw=draw.draw,
        prompt_id=draw.prompt.prompt_id,
        source=draw.prompt.source,
        level=draw.prompt.level,
        dropped="aborted",
        rewards=(),
        parts=(),
        completion_tokens=(),
        truncated=0,
        oldest_version=-1,
        newest_version=-1,
        seconds={},
        generator=-1,
    )


def _unanswered(prompt: Prompt, newest: WeightUpdate | None) -> Graded:
    """A held-out prompt that was given up counts as one whose judging failed, at the version it was asked under."""
    return Graded(
        source=prompt.source,
        level=prompt.level,
        prompt_id=prompt.prompt_id,
        reward=None,
        parts=(),
        versions=(newest.version if newest else 0,),
        num_tokens=0,
        text="",
    )
