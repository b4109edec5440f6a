"""What a person sees of a run."""

import io

from rich.console import Console

from rl.evaluation import summarise
from rl.metrics import last
from rl.orders import Graded
from rl.terminal import TerminalProgress


def shown(use) -> str:
    screen = io.StringIO()
    use(TerminalProgress(10, Console(file=screen, width=200, highlight=False, soft_wrap=True)))
    return screen.getvalue()


def graded(reward):
    return Graded(
        source="sums", level="easy", prompt_id="p", reward=reward, parts=(), versions=(3,), num_tokens=1, text=""
    )


def test_a_step_is_one_line_with_reward_held_out_score_lag_speed_useful_tokens_idle_and_time_left():
    metrics = {
        "reward/mean": last(0.5),
        "policy/lag_mean/versions": last(1.5),
        "policy/lag_max/versions": last(2),
        "policy/logprob_gap_mean/nats": last(0.031),
        "speed/sampled/tokens_per_s": last(210),
        "learner/idle_fraction": last(0.05),
        "generator/idle_fraction": last(0.4),
        "flow/useful_token_fraction": last(0.42),
        "time/step/s": last(60),
    }
    line = shown(lambda progress: progress.step(4, metrics, summarise(3, 3, [graded(1.0), graded(0.0)])))
    assert line.count("\n") == 1
    for part in (
        "4/10",
        "reward 0.50",
        "held-out 50%",
        "lag 1.5 (max 2)",
        "210 tok/s",
        "useful 42%",
        "idle: learner 5%",
        "6 min left",
    ):
        assert part in line


def test_what_was_not_measured_is_a_dash_and_never_a_number():
    line = shown(lambda progress: progress.step(1, {"time/step/s": last(1)}, None))
    assert "reward - " in line and "held-out - " in line and "nan" not in line


def test_an_evaluation_is_a_table_with_intervals_and_a_failed_judgement_is_not_a_zero():
    table = shown(lambda progress: progress.evaluation(summarise(3, 3, [graded(1.0), graded(None)])))
    assert "policy version 3" in table and "100.0%" in table and "sums" in table


def test_at_the_end_each_role_says_where_its_time_went_with_the_largest_first():
    def use(progress):
        for step in (1, 2):
            seconds = {"learner/seconds/forward": last(1.0), "learner/seconds/backward": last(2.0)}
            seconds |= {"learner/seconds/lease": last(0.001), "generator/seconds/sample": last(3.0)}
            progress.step(step, seconds | {"time/step/s": last(3.0)}, None)
        progress.where_the_time_went()
        assert progress.shares("generators") == {"sample": 1.0}

    lines = shown(use).splitlines()
    assert "time of the learner: backward 67%, forward 33%" in lines[-2]
    assert "time of the generators: sample 100%" in lines[-1]
