"""Sums between steps, the balance, and the watch over failing rewards."""

import msgspec
import pytest

from rl.accounting import USEFUL_TOKENS, RewardWatch, StepAccount, check_balance
from rl.buffer import BufferStats
from rl.metrics import total, values
from rl.orders import Draw, StepReport
from rl.trajectory import DROP_REASONS
from tests.fakes import make_cut_report, make_group, make_prompt, make_report


def counts(drawn=4, buffered=1, leased=1, trained=1, sampled=None):
    placed = buffered + leased + trained
    return BufferStats(
        drawn=drawn,
        sampled_tokens=10 * placed if sampled is None else sampled,
        buffered_groups=buffered,
        buffered_tokens=10 * buffered,
        buffered_bytes=100 * buffered,
        leased_groups=leased,
        leased_tokens=10 * leased,
        leased_bytes=100 * leased,
        trained_groups=trained,
        trained_tokens=10 * trained,
        dropped=dict.fromkeys(DROP_REASONS, (0, 0)),
        oldest_age_s=0.0,
    )


def report(rewards, dropped=None):
    return make_report(make_group(Draw(group_id="g", draw=0, prompt=make_prompt(), seed=0), rewards), dropped)


def step_of(number, useful=None):
    metrics = {} if useful is None else {USEFUL_TOKENS: total(useful)}
    return StepReport(step=number, version=number, metrics=metrics, batch_digest="", num_tokens=8, seconds={})


def test_groups_that_are_nowhere_must_be_in_flight():
    check_balance(counts(), running=1)
    with pytest.raises(RuntimeError, match="do not balance: 1 of the groups drawn are nowhere while 0 are in flight"):
        check_balance(counts(), running=0)


def test_a_group_that_appeared_from_nowhere_is_noticed():
    with pytest.raises(RuntimeError, match="-1 of the groups drawn"):
        check_balance(counts(drawn=2), running=3)


def test_a_token_that_vanished_is_noticed():
    with pytest.raises(RuntimeError, match="1 sampled tokens are nowhere"):
        check_balance(counts(sampled=31), running=1)


def test_a_steps_metrics_average_rewards_over_answers_and_count_failures_apart():
    account = StepAccount(devices=2)
    account.add(report((1.0, 0.0)))
    account.add(report((None, 1.0)))
    step = StepReport(step=1, version=1, metrics={}, batch_digest="", num_tokens=16, seconds={"forward": 0.0})
    numbers = values(account.close(step, counts(), {}))
    assert numbers["reward/mean"] == pytest.approx(2 / 3)
    assert numbers["reward/failures/sums/answer/timeout"] == 1
    assert numbers["reward/part/sums/answer"] == pytest.approx(2 / 3)
    assert numbers["flow/groups/trained"] == 2
    assert "reward/mean" not in values(account.close(step, counts(), {}))


def test_a_reward_is_not_judged_by_its_first_few_failures():
    watch = RewardWatch(0.2)
    for _ in range(15):
        watch.observe(report((None, None)))
    with pytest.raises(ValueError, match="failed on 32 of the last 32 answers"):
        watch.observe(report((None, None)))


def test_a_draw_that_no_generator_survived_counts_without_answers():
    account = StepAccount(1)
    account.add(report((), "aborted"))
    step = StepReport(step=1, version=1, metrics={}, batch_digest="", num_tokens=0, seconds={})
    metrics = values(account.close(step, counts(), {}))
    assert metrics["sampling/groups"] == 1 and "sampling/completion_length/tokens" not in metrics


def test_the_useful_share_is_that_of_all_sampled_tokens_and_that_of_the_steps_own():
    account = StepAccount(1)
    account.add(report((1.0, 0.0)))  # 8 tokens
    first = values(account.close(step_of(1, useful=6), counts(sampled=20), {}))
    assert first["flow/useful_token_fraction"] == 0.3 and first["flow/useful_token_fraction/step"] == 0.75
    second = values(account.close(step_of(2, useful=4), counts(sampled=40), {}))
    assert second["flow/useful_token_fraction"] == 0.25 and "flow/useful_token_fraction/step" not in second
    assert "flow/useful_token_fraction" not in values(account.close(step_of(3), counts(), {}))


def test_a_step_that_is_made_again_after_a_rollback_is_useful_once():
    account = StepAccount(1)
    for number in (1, 2, 3, 2, 3):
        metrics = account.close(step_of(number, useful=5), counts(sampled=30), {})
    assert values(metrics)["flow/useful_token_fraction"] == 0.5


def test_a_resumed_run_goes_on_counting_from_the_steps_that_were_kept():
    account = StepAccount(1)
    account.take_up({1: 5.0, 2: 7.0})
    metrics = account.close(step_of(3, useful=6), counts(sampled=36), {})
    assert values(metrics)["flow/useful_token_fraction"] == 0.5


def test_the_mean_reward_of_two_stages_is_that_of_the_first_answers():
    account = StepAccount(1)
    for rewards in ((0.0, 0.0), (0.0, 1.0, 1.0, 1.0, None)):
        account.add(msgspec.structs.replace(report(rewards), first_answers=2))
    numbers = values(account.close(step_of(1), counts(), {}))
    assert numbers["reward/mean"] == numbers["reward/part/sums/answer"] == 0.25
    assert numbers["sampling/stopped_at_first_fraction"] == 0.5
    assert numbers["reward/failures/sums/answer/timeout"] == 1, "failures are counted wherever they are"


def test_a_group_that_was_cut_off_has_no_length():
    account = StepAccount(1)
    account.add(make_cut_report(Draw(group_id="g", draw=0, prompt=make_prompt(), seed=0), 0))
    account.add(report((0.0, 1.0)))
    numbers = values(account.close(step_of(1), counts(), {}))
    assert numbers["sampling/groups"] == 2 and numbers["sampling/completion_length/tokens"] == 4


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_answers_of_a_batch_are_counted_as_trained_or_masked(masked):
    group = make_group(Draw(group_id="g", draw=0, prompt=make_prompt(), seed=0), (0.0, 1.0, None))
    cut = [
        msgspec.structs.replace(each, completion=msgspec.structs.replace(each.completion, finish_reason="length"))
        for each in group.trajectories[1:]
    ]
    group = msgspec.structs.replace(group, trajectories=(group.trajectories[0], *cut))
    account = StepAccount(1, mask_truncated=masked)
    account.trained([group])
    numbers = values(account.close(step_of(1), counts(), {}))
    assert numbers["batch/answers/scored"] == 2
    assert numbers["batch/answers/truncated_masked"] == int(masked)
    assert numbers["batch/answers/truncated_trained"] == int(not masked)
    assert "batch/answers/scored" not in account.close(step_of(2), counts(), {})


def timed(rewards, ledger, seconds=None):
    return msgspec.structs.replace(report(rewards), ledger=ledger, seconds=seconds or {})


def test_a_ranks_seconds_sum_to_the_wall_time_and_only_waiting_for_groups_is_idle(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rl.accounting.time.monotonic", lambda: now[0])
    account = StepAccount(1)
    with account.waiting():
        now[0] += 3.0
    now[0] += 7.0
    step = msgspec.structs.replace(step_of(1), seconds={"forward": 2.0, "backward": 4.0})
    numbers = values(account.close(step, counts(), {}))
    assert numbers["learner/seconds/idle"] == 3.0 and numbers["learner/idle_fraction"] == 0.3
    assert numbers["learner/seconds/lease"] == 1.0
    assert sum(value for name, value in numbers.items() if name.startswith("learner/seconds/")) == 10.0
    now[0] += 5.0
    assert values(account.close(step_of(2), counts(), {}))["learner/seconds/idle"] == 0.0, "a wait is counted once"


def test_a_wait_that_ranks_worked_through_is_not_idle(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rl.accounting.time.monotonic", lambda: now[0])
    account = StepAccount(1)
    with account.waiting():
        now[0] += 10.0
    step = msgspec.structs.replace(step_of(1), seconds={"checkpoint": 8.0})
    assert values(account.close(step, counts(), {}))["learner/seconds/idle"] == 2.0


def test_generators_time_is_added_up_over_their_reports():
    account = StepAccount(1)
    account.add(timed((1.0, 0.0), {"sample": 3.0, "idle": 1.0}))
    account.add(timed((1.0, 0.0), {"sample": 1.0, "judge": 0.5}))
    numbers = values(account.close(step_of(1), counts(), {}))
    assert numbers["generator/seconds/sample"] == 4.0
    assert numbers["generator/seconds/idle"] == 1.0 and numbers["generator/seconds/judge"] == 0.5


def test_how_full_an_engine_was_follows_from_groups_that_were_sampled_at_once():
    account = StepAccount(1)
    whole = timed((1.0, 0.0), {"sample": 8.0}, {"sample": 8.0})
    longest = max(whole.completion_tokens)
    account.add(whole)
    account.add(msgspec.structs.replace(whole, first_answers=1))
    numbers = values(account.close(step_of(1), counts(), {}))
    assert numbers["generator/engine_step/s"] == pytest.approx(8.0 / longest)
    assert numbers["generator/sequences/mean"] == pytest.approx(8.0 / longest * whole.num_tokens / 16.0)
