"""This file tests the laboratory: what it calls exact is, seeds do not mix, and lags are those that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learners.algorithms import find_algorithm
from learners.laboratory import Batch, Experiment, Group, batch_loss, run_experiment
from learners.ladder import END, arithmetic_ladder, build_ladder, sample
from rl.algorithm_config import AlgorithmSection
from rl.curriculum_config import CurriculumSection

SMALL = build_ladder(
    {"sums": {"easy": (0.5,), "hard": (0.3,)}, "rest": {"only": (0.4, 0.6)}}, {"sums": 2.0, "rest": 1.0}
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are tiny here: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def algorithm(name, **changes):
    return AlgorithmSection.model_validate({"name": name, **changes})


def answer(ladder, level, groups, group_size=8):
    logits = ladder.logits(ladder.start([0]))
    uniform = np.random.default_rng(5).random((groups, group_size, ladder.skills_LT.shape[1]))
    where = np.zeros(groups, dtype=int), np.full(groups, level)
    return sample(ladder, logits.log_softmax(-1).numpy(), *where, uniform)


class TestTheWorld:
    def test_the_first_pass_rates_are_the_products_that_the_ladder_was_built_from(self):
        rates = SMALL.pass_rates(SMALL.logits(SMALL.start([0], spread=0.0)))
        assert rates[0].tolist() == pytest.approx([0.5, 0.15, 0.24])

    @pytest.mark.parametrize("level", range(3))
    def test_the_exact_pass_rate_is_what_sampling_finds(self, level):
        exact = SMALL.pass_rates(SMALL.logits(SMALL.start([0])))[0, level].item()
        found = answer(SMALL, level, 2500).rewards_MG.mean()
        assert found == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 20000) ** 0.5)

    def test_an_answer_ends_at_its_end_token_and_is_wrong(self):
        found = answer(SMALL, 2, 200)
        early = found.tokens_MGT[..., 0] == END
        assert early.any()
        assert (found.sampled_MGT[early].sum(-1) == 1).all()
        assert not found.rewards_MG[early].any()

    def test_levels_share_skills_only_where_they_are_linked(self):
        linked, apart = (arithmetic_ladder(linked, mixed=False) for linked in (True, False))
        assert linked.lengths_L.tolist() == apart.lengths_L.tolist()
        assert len(set(linked.skills_LT.ravel())) < len(set(apart.skills_LT.ravel()))
        rates = [ladder.pass_rates(ladder.logits(ladder.start([0], spread=0.0))) for ladder in (linked, apart)]
        assert torch.allclose(*rates)

    def test_the_policy_gradient_of_many_answers_is_the_gradient_of_the_exact_pass_rate(self):
        level, groups = 1, 3000
        found = answer(SMALL, level, groups)
        batch = Batch((0,), (tuple(Group(level, 0, *(part[row] for part in parts(found))) for row in range(groups)),))
        parameters = SMALL.start([0]).requires_grad_(True)
        section = algorithm("rloo", loss={"name": "cispo"}, aggregation="constant_length")
        loss, ratio_N, _ = batch_loss(SMALL, find_algorithm(section), batch, SMALL.logits(parameters), 0, None)
        (estimate,) = torch.autograd.grad(-loss * SMALL.skills_LT.shape[1], parameters)
        (exact,) = torch.autograd.grad(SMALL.pass_rates(SMALL.logits(parameters))[0, level], parameters)
        assert torch.allclose(ratio_N, torch.ones_like(ratio_N))
        assert (estimate - exact).norm() < 0.05 * exact.norm()


def parts(answers):
    return answers.tokens_MGT, answers.logprobs_MGT, answers.sampled_MGT, answers.rewards_MG


class TestTheLoop:
    def test_learning_reaches_the_optimum(self):
        curves = run_experiment(SMALL, Experiment(lr=0.1, steps=80), [0, 1])
        assert curves.quality_SK[:, 0].max() < 0.5
        assert curves.quality_SK[:, -1].min() > 0.97

    @pytest.mark.parametrize("name", ["decoupled", "cispo", "tis", "icepop", "m2po"])
    def test_on_the_policy_every_correction_is_the_ppo_clip(self, name):
        experiments = [
            Experiment(algorithm=algorithm(one, aggregation="token_mean"), steps=8) for one in ("grpo", name)
        ]
        ppo, other = (run_experiment(SMALL, experiment, [0, 1]).quality_SK for experiment in experiments)
        assert other == pytest.approx(ppo, abs=1e-9)

    @pytest.mark.parametrize("name", ["scalerl", "m2po", "gspo", "reinforce_pp"])
    def test_a_seed_learns_the_same_alone_and_among_others(self, name):
        experiment = Experiment(algorithm=algorithm(name), lag=3, steps=8, engine_noise=0.05)
        together = run_experiment(SMALL, experiment, [1, 3, 5]).quality_SK
        assert run_experiment(SMALL, experiment, [3]).quality_SK[0] == pytest.approx(together[1], abs=1e-9)

    def test_a_stationary_lag_is_exact_once_there_are_versions_enough(self):
        curves = run_experiment(SMALL, Experiment(lag=2, steps=6), [0])
        assert curves.lag_mean == pytest.approx((0 + 1 + 2 * 4) / 6)

    def test_the_gate_bounds_the_lag_and_mixes_lags(self):
        lags = [run_experiment(SMALL, Experiment(lag=lag, steps=10, schedule="gate"), [0]).lag_mean for lag in (0, 4)]
        assert lags[0] == 0
        assert 0 < lags[1] <= 4

    def test_old_data_costs_the_clip_more_than_the_truncated_weight(self):
        def gain(name):
            curves = run_experiment(SMALL, Experiment(algorithm=algorithm(name), lag=8, steps=30), range(4))
            return (curves.quality_SK[:, -1] - curves.quality_SK[:, 0]).mean()

        assert gain("grpo") < gain("cispo")

    @pytest.mark.parametrize("reference", ["frozen", "ema"])
    def test_a_pull_towards_a_reference_holds_the_policy_back(self, reference):
        kl = {"coefficient": 1.0, "reference": reference}
        held = run_experiment(SMALL, Experiment(algorithm=algorithm("cispo", kl=kl), steps=20), [0])
        free = run_experiment(SMALL, Experiment(steps=20), [0])
        assert held.quality_SK[0, -1] < free.quality_SK[0, -1]

    def test_groups_that_agree_at_first_cost_only_their_first_answers(self):
        ladder = arithmetic_ladder()  # most of its levels are hopeless at first
        whole = run_experiment(ladder, Experiment(steps=3), [0, 1])
        staged = run_experiment(ladder, Experiment(steps=3, first_answers=4), [0, 1])
        fractions = [curves.useful_SK[:, -1].sum() / curves.tokens_SK[:, -1].sum() for curves in (whole, staged)]
        assert fractions[0] < fractions[1] <= 1

    def test_a_run_without_signal_stops_where_the_curriculum_would_stop_it(self):
        hopeless = build_ladder(
            {"sums": {"never": (1e-6, 1e-6)}, "rest": {"also": (1e-6, 1e-6)}}, {"sums": 1, "rest": 1}
        )
        section = CurriculumSection(name="uniform", max_uninformative_steps=2)
        works = run_experiment(SMALL, Experiment(curriculum=section, steps=2), [0])
        assert works.stopped_S.tolist() == [-1]
        with pytest.raises(ValueError, match="no seed made a step"):
            run_experiment(hopeless, Experiment(curriculum=section, steps=2), [0])
