"""The simulation keeps the rules of the run, loses no group, and agrees with what can be computed by hand."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.planner_costs import Costs, Lengths
from rl.prediction import Prediction, Setting
from rl.simulation import simulate
from rl.simulation_engine import EngineCosts, SimulatedEngine, SimulatedGroup

ONE = Setting(
    generators=1, ranks=1, max_sequences=64, group_size=4, max_tokens=100, groups_per_step=2, max_lag=1
)  # eight answers a step
FREE = Costs(
    engine_fixed_s=0.1,
    engine_sequence_s=0.0,
    learner_fixed_s=1.0,
    learner_token_s=0.0,
    lengths=Lengths(groups=((10,),)),
)  # an engine whose step takes 0.1 s whatever it decodes, and answers of 10 tokens
UNEVEN = msgspec.structs.replace(
    FREE,
    engine_sequence_s=0.01,
    learner_token_s=0.003,
    lengths=Lengths(mean_tokens=20, sigma=0.9),
    judge_s=0.2,
    zero_advantage_share=0.3,
    publish_s=0.1,
    between_s=0.05,
    pause_s=0.3,
    confirm_s=0.1,
)


def changed(setting: Setting, **changes) -> Setting:
    return msgspec.structs.replace(setting, **changes)


def costs(base: Costs, **changes) -> Costs:
    return msgspec.structs.replace(base, **changes)


def unaccounted(found: Prediction) -> int:
    placed = found.trained + found.waiting + found.running + found.stale_groups + found.zero_advantage_groups
    return found.drawn - placed


class TestByHand:
    def test_turns_take_the_sum_of_both_sides(self):
        found = simulate(changed(ONE, max_lag=0), FREE, steps=10, skip=2)
        assert found.step_s == pytest.approx(10 * 0.1 + 1.0)
        assert found.learner_idle == found.generator_idle == pytest.approx(0.5)
        assert found.overlap == 0 and found.lag_max == 0 and found.lag_mean == pytest.approx(0)
        assert found.sampled_tokens_per_s == pytest.approx(80 / 2.0)
        assert found.trajectories_per_s == pytest.approx(8 / 2.0)
        assert found.step_p90_s == pytest.approx(found.step_s)

    def test_turns_add_judging_publishing_the_pause_and_the_driver_up(self):
        given = costs(FREE, judge_s=0.2, publish_s=0.3, between_s=0.4, prepare_s=0.1, pause_s=0.5, confirm_s=0.6)
        given = costs(given, learner_token_s=0.01)
        found = simulate(changed(ONE, max_lag=0), given, steps=10, skip=2)
        # two groups are judged one after the other; an update goes on beside the driver
        assert found.step_s == pytest.approx(1.0 + 2 * 0.2 + (1.0 + 80 * 0.01) + 0.3 + 0.1 + 0.5 + 0.6)

    def test_a_learner_that_is_slow_sets_the_pace_and_generators_wait_for_it(self):
        found = simulate(ONE, costs(FREE, learner_fixed_s=4.0), steps=40, skip=5)
        assert found.step_s == pytest.approx(4.0)
        assert found.learner_idle == 0
        # as a version is confirmed, a batch may be drawn, which takes a second
        assert found.generator_idle == pytest.approx(0.75, abs=0.02)
        assert found.overlap == pytest.approx(0.25, abs=0.02)

    def test_a_learner_that_is_fast_waits_for_what_the_engine_can_do(self):
        given = costs(FREE, engine_sequence_s=0.1, learner_fixed_s=0.5)
        found = simulate(changed(ONE, max_sequences=4), given, steps=40, skip=5)
        # one group at a time, in ten engine steps of 0.1 + 4 * 0.1 seconds
        assert found.step_s == pytest.approx(2 * 10 * 0.5)
        assert found.learner_idle == pytest.approx(0.95)
        assert found.generator_idle == 0 and found.sequences_mean == pytest.approx(4)

    def test_prefill_is_paid_once_a_group(self):
        given = costs(FREE, prefill_token_s=0.01, prompt_tokens=30)
        found = simulate(changed(ONE, max_lag=0), given, steps=10, skip=2)
        assert found.step_s == pytest.approx(2 * 0.3 + 1.0 + 1.0)

    def test_ranks_share_the_tokens_and_the_one_with_most_groups_counts(self):
        given = costs(FREE, learner_fixed_s=0.0, learner_token_s=0.1)
        in_turns = changed(ONE, max_lag=0, groups_per_step=3)
        by_ranks = {ranks: simulate(changed(in_turns, ranks=ranks), given, 10, 2).step_s - 1.0 for ranks in (1, 2, 3)}
        assert by_ranks == pytest.approx({1: 12.0, 2: 8.0, 3: 4.0})

    def test_two_stages_sample_the_rest_only_of_what_teaches(self):
        given = costs(FREE, zero_advantage_share=0.5)
        whole = simulate(changed(ONE, max_lag=2), given, steps=200, skip=10)
        staged = simulate(changed(ONE, max_lag=2, first_answers=2), given, steps=200, skip=10)
        dropped = staged.zero_advantage_groups / staged.drawn
        assert dropped == pytest.approx(whole.zero_advantage_groups / whole.drawn, abs=0.05)
        tokens = 10 * (4 * (1 - dropped) + 2 * dropped) / (1 - dropped) * 2
        assert staged.sampled_tokens_per_s * staged.step_s == pytest.approx(tokens, rel=0.1)

    def test_in_a_round_the_second_stage_waits_for_all_first_answers(self):
        given = costs(FREE, lengths=Lengths(groups=((10,), (30,))))
        found = simulate(
            changed(ONE, max_lag=0, max_sequences=999, first_answers=2, groups_per_step=40), given, steps=10, skip=2
        )
        assert found.step_s == pytest.approx(2 * 30 * 0.1 + 1.0)

    def test_shared_cores_slow_both_sides_while_both_compute(self):
        given = costs(FREE, learner_fixed_s=4.0)
        # the second that a batch takes becomes 1.5, in which the learner does the work of one
        assert simulate(ONE, costs(given, contention=1.5), 40, 5).step_s == pytest.approx(4.5)
        in_turns = changed(ONE, max_lag=0)
        assert simulate(in_turns, costs(given, contention=1.5), 10, 2).step_s == pytest.approx(5.0)

    def test_to_the_end_draws_no_more_than_is_trained(self):
        found = simulate(ONE, FREE, steps=10, skip=2, to_the_end=True)
        assert (found.drawn, found.trained, found.waiting, found.running) == (20, 20, 0, 0)


class TestRules:
    @settings(max_examples=60, deadline=None)
    @given(
        lag=st.integers(0, 4),
        generators=st.integers(1, 4),
        max_sequences=st.integers(1, 32),
        seed=st.integers(0, 1000),
        cut_tails=st.booleans(),
        first_answers=st.sampled_from([None, 2]),
    )
    def test_no_group_is_lost_and_none_trained_is_older_than_the_bound(
        self, lag, generators, max_sequences, seed, cut_tails, first_answers
    ):
        setting = changed(
            ONE,
            max_lag=lag,
            generators=generators,
            max_sequences=max_sequences,
            cut_tails=cut_tails,
            first_answers=first_answers,
        )
        found = simulate(setting, UNEVEN, steps=12, skip=2, seed=seed)
        assert found.lag_max <= lag and found.lag_mean <= found.lag_max + 1e-9
        assert unaccounted(found) == 0
        assert 0 <= found.learner_idle <= 1 and 0 <= found.generator_idle <= 1
        assert found.waiting + found.running <= (lag + 1) * setting.groups_per_step

    @pytest.mark.parametrize("seed", range(5))
    def test_with_max_lag_0_sampling_and_training_never_overlap(self, seed):
        found = simulate(changed(ONE, max_lag=0, generators=3), UNEVEN, steps=20, skip=0, seed=seed)
        assert found.overlap == 0 and found.stale_groups == 0 and found.lag_max == 0
        assert simulate(changed(ONE, max_lag=1, generators=3), UNEVEN, steps=20, skip=0, seed=seed).overlap > 0

    def test_one_seed_gives_one_prediction_and_another_seed_another(self):
        assert simulate(ONE, UNEVEN, seed=1) == simulate(ONE, UNEVEN, seed=1)
        assert simulate(ONE, UNEVEN, seed=1) != simulate(ONE, UNEVEN, seed=2)

    def test_more_lag_is_never_slower_here_and_uses_both_sides_more(self):
        by_lag = [simulate(changed(ONE, max_lag=lag), UNEVEN, steps=200, skip=10) for lag in (0, 1, 2)]
        assert by_lag[0].step_s > by_lag[1].step_s > by_lag[2].step_s
        assert by_lag[0].overlap < by_lag[1].overlap

    def test_slow_groups_that_outlive_the_bound_are_dropped_and_cut_tails_cost_less(self):
        slow = costs(FREE, lengths=Lengths(groups=((10,),) * 9 + ((100,),)), learner_fixed_s=0.1)
        finished = simulate(changed(ONE, generators=4), slow, steps=200)
        cut = simulate(changed(ONE, generators=4, cut_tails=True), slow, steps=200)
        assert finished.stale_groups and cut.stale_groups
        assert unaccounted(finished) == unaccounted(cut) == 0
        tokens = [each.sampled_tokens_per_s * each.step_s for each in (finished, cut)]
        assert tokens[1] < tokens[0]

    def test_kept_groups_of_equal_rewards_count_in_their_batch(self):
        kept = simulate(changed(ONE, keep_zero_advantage=True), UNEVEN)
        assert kept.zero_advantage_groups == 0 and unaccounted(kept) == 0

    @pytest.mark.parametrize("waits", [False, True])
    def test_rarer_deliveries_pause_less_and_lag_more(self, waits):
        given = costs(UNEVEN, pause_s=1.0)
        setting = changed(ONE, max_lag=3, waits_for_delivery=waits)
        often = simulate(setting, given, steps=100)
        rarely = simulate(changed(setting, update_every_steps=3), given, steps=100)
        assert rarely.lag_max <= 3 and rarely.step_s < often.step_s and rarely.lag_mean > often.lag_mean

    def test_deliveries_so_rare_that_the_gate_would_close_are_refused(self):
        with pytest.raises(ValueError, match="raise max_lag to 2"):
            Setting(**(msgspec.structs.asdict(ONE) | {"update_every_steps": 3}))


class TestAnEngine:
    def engine(self, max_sequences: int = 2) -> SimulatedEngine:
        return SimulatedEngine(0, EngineCosts(fixed_s=1.0, sequence_s=1.0), max_sequences)

    def group(self, *lengths: int) -> SimulatedGroup:
        return SimulatedGroup(draw=0, admitted_version=0, lengths=lengths, teaches=True)

    def test_its_rate_follows_the_sequences_in_flight(self):
        engine, group = self.engine(), self.group(1, 3)
        engine.ask(group, 2)
        assert engine.next_end() == pytest.approx(3.0)  # one step of 1 + 2 seconds
        engine.advance(3.0)
        assert engine.ended() == [] and engine.in_flight == 1
        assert engine.next_end() == pytest.approx(3.0 + 2 * 2.0)
        engine.advance(7.0)
        assert engine.ended() == [group] and group.tokens == engine.tokens == 4

    def test_a_sequence_waits_for_a_place(self):
        engine, group = self.engine(max_sequences=1), self.group(2, 2)
        engine.ask(group, 2)
        engine.advance(4.0)
        assert engine.ended() == [] and engine.in_flight == 1
        assert engine.next_end() == pytest.approx(8.0)

    def test_tokens_are_counted_with_the_version_that_they_were_sampled_with(self):
        engine, group = self.engine(max_sequences=1), self.group(4)
        engine.ask(group, 1)
        engine.advance(2.0)
        engine.load(7, pause_s=5.0)
        assert engine.next_end() == pytest.approx(2.0 + 5.0 + 3 * 2.0)
        engine.advance(13.0)
        assert engine.ended() == [group]
        assert group.oldest_version == 0 and group.version_tokens == pytest.approx(3 * 7)

    def test_a_group_that_is_cut_keeps_its_tokens_and_leaves_its_place(self):
        engine, group, other = self.engine(), self.group(8, 8, 8), self.group(2)
        engine.ask(group, 3)
        engine.ask(other, 1)
        engine.advance(3.0)
        engine.cut(group)
        assert group.tokens == 2 and engine.in_flight == 1
        assert engine.next_end() == pytest.approx(3.0 + 2 * 2.0)
