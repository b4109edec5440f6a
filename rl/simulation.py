"""This file simulates a run: the gate, the buffer, the rounds and the updates of the loops, with costs for the parts.

Every rule is the one of the code that it stands for: `rl.staleness.Gate` itself, drawing and rounds of rl/sampling.py,
leases of rl/buffer.py, deliveries of rl/delivery.py, the order of a step of rl/run.py. docs/planner.md names them.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable

from rl.planner_costs import Costs
from rl.prediction import Prediction, Setting
from rl.simulation_engine import EngineCosts, SimulatedEngine, SimulatedGroup
from rl.staleness import Gate


def simulate(
    setting: Setting, costs: Costs, steps: int = 40, skip: int = 4, seed: int = 0, to_the_end: bool = False
) -> Prediction:
    """Simulate `steps` steps and measure those after the first `skip`.

    to_the_end draws no more groups than the steps can train, as a run does near its end; without it the last steps are
    like those in the middle of a long run.
    """
    assert steps > skip >= 0
    return _Simulation(setting, costs, random.Random(seed), steps if to_the_end else None).run(steps, skip)


class _Simulation:
    """The state of a simulated run. Events are calls at a time."""

    def __init__(self, setting: Setting, costs: Costs, random_source: random.Random, last_step: int | None) -> None:
        self.setting = setting
        self.costs = costs
        self.gate = Gate(setting.max_lag, setting.groups_per_step)
        engine = EngineCosts(costs.engine_fixed_s, costs.engine_sequence_s, costs.prefill_token_s * costs.prompt_tokens)
        self.engines = [SimulatedEngine(at, engine, setting.max_sequences) for at in range(setting.generators)]
        self._free = [(0, engine.index) for engine in self.engines]  # a heap of (groups in hand, engine)
        self._random = random_source
        self._last_step = last_step
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0
        self.step = 0
        self.sampling_version = 0
        self._offered = 0
        self._delivering = False
        self._round: list[SimulatedGroup] | None = None  # the ended groups of the round that holds the engines
        self._round_size = 0
        self._running: dict[int, SimulatedGroup] = {}
        self._where: dict[int, SimulatedEngine] = {}
        self._buffer: deque[SimulatedGroup] = deque()  # fresh when the learner was at _looked_at
        self._looked_at = 0
        self._arrived: list[SimulatedGroup] = []  # in the buffer since that look
        self._waiting_since: float | None = None
        self._learning = False
        self._work_s = self._worked_to = 0.0  # seconds of the step that are left, at its own pace, and since when
        self._learner_stamp = 0
        self._sampling = 0  # engines with sequences in flight
        self.drawn = self.stale = self.zero_advantage = self.trained = 0
        self.learner_idle_s = self.overlap_s = 0.0
        self.lags: list[int] = []
        self.token_lag = self.trained_tokens = 0.0
        self.step_ends: list[float] = []

    def run(self, steps: int, skip: int) -> Prediction:
        self._ready()
        self._draw()
        before = self._totals()
        while len(self.step_ends) < steps:
            if not self._events:
                raise RuntimeError(f"the simulation stands still at step {self.step} with {self.setting}")
            time, _, happen = heapq.heappop(self._events)
            if self._learning and self._sampling:
                self.overlap_s += time - self.now
            self.now = time
            made = len(self.step_ends)
            happen()
            if made < len(self.step_ends) == skip:
                before = self._totals()
        return self._predict(before, skip)

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (self.now + seconds, self._scheduled, happen))

    # Drawing: Sampler.loop, _room, _sample_round and _absorb; GeneratorFleet.rollout and rollout_round

    def _room(self) -> int:
        room = self.gate.room(self.sampling_version)
        if self._last_step is None:
            return room
        needed = self._last_step * self.setting.groups_per_step - self.gate.accepted - self.gate.running
        return min(room, needed)

    def _draw(self) -> None:
        self._cut_tails()
        if self.setting.max_lag:
            while self._room() > 0:
                self._sample(self._least_loaded())
        elif self._round is None and not self._delivering and self.gate.round_open(self.sampling_version):
            size = self._room()
            if size > 0:
                self._round, self._round_size = [], size
                for place in range(size):
                    self._sample(self.engines[place % len(self.engines)])

    def _least_loaded(self) -> SimulatedEngine:
        while True:
            in_hand, index = heapq.heappop(self._free)
            if self.engines[index].in_hand == in_hand:
                return self.engines[index]

    def _sample(self, engine: SimulatedEngine) -> None:
        setting, chance = self.setting, self._random
        self.gate.admit()
        group = SimulatedGroup(
            draw=self.drawn,
            admitted_version=self.sampling_version,
            lengths=self.costs.lengths.draw(chance, setting.group_size, setting.max_tokens),
            teaches=chance.random() >= self.costs.zero_advantage_share,
        )
        self.drawn += 1
        self._running[group.draw] = group
        self._where[group.draw] = engine
        engine.advance(self.now)
        self._take_in_hand(engine, 1)
        engine.ask(group, setting.first_answers or setting.group_size)
        self._wake(engine)

    def _take_in_hand(self, engine: SimulatedEngine, count: int) -> None:
        engine.in_hand += count
        heapq.heappush(self._free, (engine.in_hand, engine.index))

    def _wake(self, engine: SimulatedEngine) -> None:
        """Have an engine's next end happen; what was expected before is void."""
        engine.stamp += 1
        end = engine.next_end()
        if engine.is_sampling != (end is not None):
            engine.is_sampling = end is not None
            self._work()  # at the pace that there was
            self._sampling += 1 if engine.is_sampling else -1
            self._expect_learned()
        if end is not None:
            stamp = engine.stamp
            self._at(max(0.0, end - self.now), lambda: self._ends(engine, stamp))

    def _ends(self, engine: SimulatedEngine, stamp: int) -> None:
        if stamp != engine.stamp:
            return
        engine.advance(self.now)
        ended = engine.ended()
        self._wake(engine)
        engine.to_judge.extend(ended)
        self._judge(engine)

    def _judge(self, engine: SimulatedEngine) -> None:
        while engine.to_judge and engine.judging < self.setting.judge_workers:
            group = engine.to_judge.popleft()
            engine.judging += 1
            self._at(self.costs.judge_s, lambda group=group: self._judged(engine, group))

    def _judged(self, engine: SimulatedEngine, group: SimulatedGroup) -> None:
        engine.advance(self.now)
        engine.judging -= 1
        if group.teaches and group.asked < len(group.lengths):
            engine.further.append(group)
        else:
            self._end(engine, group)
        if self._round is None or len(engine.further) == engine.in_hand:  # a generator's round has two stages
            for each in engine.further:
                engine.ask(each, len(each.lengths) - each.asked)
            engine.further.clear()
            self._wake(engine)
        self._judge(engine)

    def _end(self, engine: SimulatedEngine, group: SimulatedGroup) -> None:
        self._take_in_hand(engine, -1)
        del self._where[group.draw]
        if self._round is None:
            self._absorb(group)
            self._changed()
            return
        self._round.append(group)
        if len(self._round) == self._round_size:
            ended, self._round = sorted(self._round, key=lambda each: each.draw), None
            for each in ended:
                self._absorb(each)
            self._deliver()
            self._changed()

    def _absorb(self, group: SimulatedGroup) -> None:
        del self._running[group.draw]
        if group.is_cut:
            self.stale += 1
            self.gate.drop_running()
        elif group.teaches or self.setting.keep_zero_advantage:
            self.gate.publish()
            self._arrived.append(group)
        else:
            self.zero_advantage += 1
            self.gate.drop_running()

    def _cut_tails(self) -> None:
        oldest = self.step - self.setting.max_lag
        if not self.setting.cut_tails or not self.setting.max_lag:
            return
        for group in [group for group in self._running.values() if group.admitted_version < oldest]:
            engine = self._where[group.draw]
            if group.left and not group.is_cut:
                engine.advance(self.now)
                engine.cut(group)
                self._wake(engine)
                self._take_in_hand(engine, -1)
                del self._where[group.draw]
                self._absorb(group)

    # Training: Run._lease, _train_on and _record

    def _changed(self) -> None:
        """A group came or went, a step was made or a version delivered: the loops look again."""
        self._lease()
        self._draw()

    def _ready(self) -> None:
        self._waiting_since = self.now
        self._lease()

    def _lease(self) -> None:
        if self._waiting_since is None:
            return
        self._drop_stale()
        if len(self._buffer) < self.setting.groups_per_step:
            return
        batch = [self._buffer.popleft() for _ in range(self.setting.groups_per_step)]
        self.learner_idle_s += self.now - self._waiting_since
        self._waiting_since = None
        self._learn(batch)

    def _drop_stale(self) -> None:
        held = self._buffer if self._looked_at != self.step else deque[SimulatedGroup]()
        looked_at = [*held, *self._arrived]
        fresh = [group for group in looked_at if self.gate.is_fresh(self.step, group.oldest_version)]
        held.clear()
        self._arrived.clear()
        self._buffer.extend(fresh)
        self._looked_at = self.step
        self.stale += len(looked_at) - len(fresh)
        self.gate.drop_accepted(len(looked_at) - len(fresh))

    def _learn(self, batch: list[SimulatedGroup]) -> None:
        tokens = sum(group.tokens for group in batch)
        self.lags += [self.gate.lag(self.step, group.oldest_version) for group in batch]
        self.token_lag += sum(self.step * group.tokens - group.version_tokens for group in batch)
        self.trained_tokens += tokens
        self.trained += len(batch)
        seconds = self.costs.learner_s(tokens, len(batch), self.setting.ranks)
        self._learning, self._work_s, self._worked_to = True, seconds, self.now
        self._slow(self.costs.contention)
        self._expect_learned()

    def _work(self) -> None:
        """Count what the learner has computed by now."""
        if self._learning:
            self._work_s -= (self.now - self._worked_to) / (self.costs.contention if self._sampling else 1.0)
            self._worked_to = self.now

    def _expect_learned(self) -> None:
        """Have the step end when its work is done; what was expected before is void."""
        if self._learning:
            self._learner_stamp += 1
            stamp, pace = self._learner_stamp, self.costs.contention if self._sampling else 1.0
            self._at(max(0.0, self._work_s) * pace, lambda: self._learned(stamp))

    def _learned(self, stamp: int) -> None:
        if stamp != self._learner_stamp:
            return
        self._learning = False
        self._slow(1.0)
        self.step += 1
        self._changed()
        offers = self.step % self.setting.update_every_steps == 0
        self._at(self.costs.publish_s if offers else 0.0, lambda: self._published(offers))

    def _published(self, offers: bool) -> None:
        if offers:
            self._offered = self.step
            self._deliver()
        if not (offers and self.setting.waits_for_delivery):
            self._at(self.costs.between_s, self._step_ended)

    def _step_ended(self) -> None:
        self.step_ends.append(self.now)
        self._ready()

    def _slow(self, slowdown: float) -> None:
        if self.costs.contention == 1.0:
            return
        for engine in self.engines:
            engine.advance(self.now)
            engine.slowdown = slowdown
            self._wake(engine)

    # Updates: Delivery.loop

    def _deliver(self) -> None:
        """Have the newest offered version prepared beside sampling, loaded in a pause, and counted once confirmed."""
        if self._delivering or self._round is not None or self._offered <= self.sampling_version:
            return
        self._delivering, version = True, self._offered
        self._at(self.costs.prepare_s, lambda: self._load(version))

    def _load(self, version: int) -> None:
        for engine in self.engines:
            engine.advance(self.now)
            engine.load(version, self.costs.pause_s)
            self._wake(engine)
        self._at(self.costs.pause_s + self.costs.confirm_s, lambda: self._delivered(version))

    def _delivered(self, version: int) -> None:
        self._delivering = False
        self.sampling_version = version
        if self.setting.waits_for_delivery:
            self._at(self.costs.between_s, self._step_ended)
        self._deliver()
        self._changed()

    # What came of it

    def _totals(self) -> tuple[float, ...]:
        for engine in self.engines:
            engine.advance(self.now)
        return (
            self.now,
            sum(engine.tokens for engine in self.engines),
            sum(engine.sequence_s for engine in self.engines),
            sum(engine.idle_s for engine in self.engines),
            self.learner_idle_s,
            self.overlap_s,
            len(self.lags),
            self.token_lag,
            self.trained_tokens,
        )

    def _predict(self, before: tuple[float, ...], skip: int) -> Prediction:
        totals = (after - then for then, after in zip(before, self._totals(), strict=True))
        wall, tokens, sequence_s, idle_s, learner_idle_s, overlap_s, _, token_lag, trained_tokens = totals
        starts = [0.0, *self.step_ends]
        seconds = sorted(end - start for start, end in zip(starts[skip:], self.step_ends[skip:], strict=False))
        lags, engines = self.lags[int(before[6]) :], len(self.engines)
        return Prediction(
            step_s=wall / len(seconds),
            step_p90_s=seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))],
            trajectories_per_s=len(seconds) * self.setting.groups_per_step * self.setting.group_size / wall,
            sampled_tokens_per_s=tokens / wall,
            sequences_mean=sequence_s / max(1e-12, engines * wall - idle_s),
            learner_idle=learner_idle_s / wall,
            generator_idle=idle_s / (engines * wall),
            overlap=overlap_s / wall,
            lag_mean=max(0.0, token_lag / trained_tokens),  # rounding
            lag_oldest_mean=sum(lags) / len(lags),
            lag_max=max(lags),
            stale_groups=self.stale,
            zero_advantage_groups=self.zero_advantage,
            drawn=self.drawn,
            trained=self.trained,
            waiting=len(self._buffer) + len(self._arrived),
            running=self.gate.running,
        )
