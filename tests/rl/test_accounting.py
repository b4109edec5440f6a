"""Sums between steps, the balance, and the watch over failing rewards."""

import pytest

from rl.accounting import RewardWatch, StepAccount, check_balance
from rl.buffer import BufferStats
from rl.metrics import values
from rl.orders import Draw, StepReport
from rl.trajectory import DROP_REASONS
from tests.fakes import make_group, make_prompt, make_report


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
