"""This file tests learners/learner.py: the same gradient for any split, the gate, what a step reports and publishes."""

from __future__ import annotations

import pathlib
import sys
import types

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learners import layouts
from learners.advantages import grpo
from learners.algorithms import Algorithm
from learners.optimizer import NonFiniteGradient
from rl.weights import NcclGroup, UpdateReceipt, verify
from tests.learners.tiny import (
    gradients_of,
    make_learner,
    order_of,
    plan_within,
    random_group,
    run_ranks,
    save_tiny_llama,
    settings_for,
    weights_of,
)

GROUPS = [random_group(index, rewards=(0.0, 1.0, None, 0.5)) for index in range(6)]


@pytest.fixture
def model_of_two_layers(tmp_path):
    return save_tiny_llama(tmp_path / "model")


@pytest.fixture
def learner_on(model_of_two_layers, tmp_path, only_learner):
    """Makes learners, one after another."""

    def make(groups=GROUPS, dtype=torch.float64, algorithm="cispo", **options):
        settings = settings_for(model_of_two_layers, tmp_path / "ranks", algorithm, **options)
        return only_learner(settings, groups, dtype)

    return make


def batch_gradients(learner, groups=GROUPS, rank=0, world_size=1, budget=256):
    order = order_of(groups)
    plan = plan_within(learner, order.entries, world_size, budget)
    learner.accumulate_gradient(order, plan, {index: groups[index] for index in plan.groups_of(rank)})
    return gradients_of(learner)


CASES = {"one micro-batch": (6, 1000), "many micro-batches": (6, 60), "one rank without work": (1, 1000)}


def save_rank_gradients(rank, world_size, model_dir, folder):
    """Runs in a process of its own."""
    learner = make_learner(settings_for(model_dir, pathlib.Path(folder)), GROUPS, rank, world_size)
    for case, (count, budget) in CASES.items():
        found = batch_gradients(learner, GROUPS[:count], rank, world_size, budget)
        learner.policy.zero_grad()
        if rank == 0:
            torch.save(found, f"{folder}/{case}.pt")
    metrics = learner.step(order_of(GROUPS)).metrics
    if rank == 0:
        torch.save([metrics["learner/loss"].value, metrics["learner/loss_abs"].value], f"{folder}/loss.pt")
        assert metrics["learner/ranks"].value == world_size
    learner.close()


def assert_same(found, expected, relative=1e-9):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= relative * gradient.norm(), name


@pytest.mark.parametrize("budget", [60, 130])
def test_the_gradient_is_the_same_for_any_micro_batching(learner_on, budget):
    expected = batch_gradients(learner_on(), budget=1000)
    assert_same(batch_gradients(learner_on(), budget=budget), expected)


def literal_loss(model_dir, groups):
    """CISPO's loss as it is written: one answer at a time through plain transformers, in fp64."""
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    losses = []
    for group in groups:
        scored = [t for t in group.trajectories if t.reward is not None]
        advantages = [advantage for advantage in grpo([group.rewards])[0] if advantage is not None]
        for trajectory, advantage in zip(scored, advantages, strict=True):
            answer, prompt = trajectory.completion.token_ids, group.prompt.token_ids
            with torch.no_grad():
                logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            ratios = (logprobs - torch.tensor(trajectory.completion.logprobs, dtype=torch.float64)).exp()
            losses += (-ratios.clamp(max=5.0) * advantage * logprobs).tolist()
    return sum(losses) / len(losses), sum(map(abs, losses)) / len(losses)


def test_two_ranks_have_the_gradient_and_the_loss_of_one_even_if_one_has_nothing_to_do(
    learner_on, model_of_two_layers, tmp_path
):
    run_ranks(save_rank_gradients, 2, model_of_two_layers, str(tmp_path / "two"))
    for case, (count, _) in CASES.items():
        expected = batch_gradients(learner_on(), GROUPS[:count], budget=1000)
        assert_same(torch.load(tmp_path / "two" / f"{case}.pt"), expected)
    found = [torch.load(tmp_path / "two" / "loss.pt")]
    for budget in (60, 1000):
        metrics = learner_on(micro_batch_tokens=budget).step(order_of(GROUPS)).metrics
        found.append([metrics["learner/loss"].value, metrics["learner/loss_abs"].value])
    # Llama's norms compute in fp32
    assert tuple(found[0]) == pytest.approx(literal_loss(model_of_two_layers, GROUPS), rel=1e-6)
    for loss, scale in found[1:]:
        assert abs(loss - found[0][0]) <= 1e-9 * scale and abs(scale - found[0][1]) <= 1e-9 * scale


def test_what_a_failed_trajectory_says_changes_nothing(learner_on):
    expected = batch_gradients(learner_on())
    changed = []
    for group in GROUPS:
        failed = group.trajectories[2]
        tokens = tuple(3 + token % 5 for token in failed.completion.token_ids)
        other = msgspec.structs.replace(failed, completion=msgspec.structs.replace(failed.completion, token_ids=tokens))
        changed.append(
            msgspec.structs.replace(group, trajectories=(*group.trajectories[:2], other, *group.trajectories[3:]))
        )
    assert_same(batch_gradients(learner_on(changed), changed), expected)


def test_the_gradient_is_divided_by_the_scored_tokens_of_the_batch(learner_on):
    alone = batch_gradients(learner_on(), GROUPS[:1])
    tokens = [sum(len(t.completion.token_ids) for t in g.trajectories if t.reward is not None) for g in GROUPS[:2]]
    # a second group without advantage adds tokens to the normaliser and nothing to the sum
    quiet = msgspec.structs.replace(
        GROUPS[1],
        trajectories=tuple(msgspec.structs.replace(t, reward=t.reward and 0.0) for t in GROUPS[1].trajectories),
    )
    both = batch_gradients(learner_on([GROUPS[0], quiet]), [GROUPS[0], quiet])
    scale = tokens[0] / sum(tokens)
    expected = {name: gradient * scale for name, gradient in alone.items()}
    assert_same(both, expected, relative=1e-6)  # Llama's norms compute in fp32, where another scale rounds otherwise


def test_the_first_step_gate_closes_before_the_weights_move(learner_on):
    learner = learner_on(max_logprob_gap=0.05)
    before = weights_of(learner)
    with pytest.raises(ValueError, match=r"disagree by \d.\d+ nats .* version 1 .*learner.max_logprob_gap"):
        learner.step(order_of(GROUPS, first=True))
    torch.testing.assert_close(weights_of(learner), before, rtol=0, atol=0)


def scored_by(learner, group):
    """The group as an engine at the learner's weights and version would have reported it."""
    count = len(group.rewards)
    packed = layouts.pack([layouts.Share(group, (0.0,) * count, (0.0,) * count)], version=1)
    logprobs = learner.policy(*packed.inputs, 0.8)[0].tolist()
    trajectories = []
    for trajectory in group.trajectories:
        count = len(trajectory.completion.token_ids)
        values, logprobs = tuple(logprobs[:count]), logprobs[count:]
        completion = msgspec.structs.replace(trajectory.completion, logprobs=values)
        trajectories.append(msgspec.structs.replace(trajectory, completion=completion))
    return msgspec.structs.replace(group, trajectories=tuple(trajectories))


def test_the_gate_opens_for_an_engine_that_agrees_and_later_steps_have_none(learner_on):
    scored = [scored_by(learner_on(), group) for group in GROUPS]
    learner = learner_on(scored)
    report = learner.step(order_of(scored, first=True))
    assert report.version == 2 and report.metrics["policy/logprob_gap_max/nats"].value < 1e-9
    assert report.metrics["policy/effective_sample_fraction"].value == pytest.approx(1.0)
    learner.step(order_of(scored, step=2))


def test_a_log_probability_that_is_not_finite_stops_the_run_before_the_weights_move(learner_on):
    broken = scored_by(learner_on(), GROUPS[0])
    completion = broken.trajectories[0].completion
    completion = msgspec.structs.replace(completion, logprobs=(float("nan"), *completion.logprobs[1:]))
    first = msgspec.structs.replace(broken.trajectories[0], completion=completion)
    broken = msgspec.structs.replace(broken, trajectories=(first, *broken.trajectories[1:]))
    learner = learner_on([broken])
    before = weights_of(learner)
    with pytest.raises(NonFiniteGradient):
        learner.step(order_of([broken]))
    torch.testing.assert_close(weights_of(learner), before, rtol=0, atol=0)


def test_a_step_raises_the_likelihood_of_what_was_better_than_its_siblings(learner_on):
    group = scored_by(learner_on(), random_group(3, rewards=(1.0, 0.0)))
    learner = learner_on([group], lr=1e-3)
    learner.step(order_of([group]))
    prompt, before = group.prompt.token_ids, [sum(t.completion.logprobs) for t in group.trajectories]
    after = [sum(t.completion.logprobs) for t in scored_by(learner, group).trajectories]
    assert len(prompt) and after[0] > before[0] and after[1] < before[1]


def test_a_report_counts_tokens_and_seconds_and_its_digest_ignores_the_run_but_not_the_content(learner_on):
    report = learner_on().step(order_of(GROUPS))
    scored = sum(len(t.completion.token_ids) for group in GROUPS for t in group.trajectories if t.reward is not None)
    assert report.num_tokens == report.metrics["learner/trained/tokens"].value == scored
    assert {"fetch", "pack", "forward", "backward", "step"} <= report.seconds.keys()
    renamed = [msgspec.structs.replace(group, group_id=f"other-{group.group_id}") for group in GROUPS]
    assert learner_on(renamed).step(order_of(renamed)).batch_digest == report.batch_digest
    assert learner_on().step(order_of(GROUPS[::-1])).batch_digest != report.batch_digest


def test_two_learners_of_one_seed_end_with_the_same_bits(learner_on):
    finals = []
    for _ in range(2):
        learner = learner_on(dtype=None)
        for step in (1, 2):
            learner.step(order_of(GROUPS, step=step))
        finals.append(weights_of(learner))
    torch.testing.assert_close(finals[0], finals[1], rtol=0, atol=0)


def test_a_published_version_is_what_the_learner_computes_with(learner_on):
    learner = learner_on(dtype=None)
    first = learner.publish(1)
    learner.step(order_of(GROUPS))
    second = learner.publish(2)
    assert second.moved and second.digest != first.digest and second.num_bytes > 0
    tensors = load_file(second.path)
    assert set(tensors) == {tensor.name for tensor in second.tensors}
    for name, weight in weights_of(learner).items():
        assert torch.equal(tensors[name], weight.bfloat16()), name
    assert len(second.canary_logprobs) == len(second.canary_token_ids) - 1
    receipt = UpdateReceipt(
        version=2,
        tensors=second.tensors,
        missing=(),
        canary_logprobs=second.canary_logprobs,
        seconds={},
        generator=0,
    )
    assert verify(second, receipt, first, 0.1) == 0.0
    learner.close()
    assert not pathlib.Path(second.path).exists()


class FakeNcclSender:
    """Remembers what it was given instead of broadcasting it: there is no second GPU here."""

    def __init__(self, group):
        self.group, self.sent, self.closed = group, [], False

    def send(self, tensors):
        self.sent.append(dict(tensors))

    def close(self):
        self.closed = True


def test_after_joining_a_version_is_held_for_nccl_in_the_order_of_its_description(learner_on, monkeypatch):
    fake_module = types.SimpleNamespace(NcclSender=FakeNcclSender)
    monkeypatch.setitem(sys.modules, "learners.nccl_sender", fake_module)
    learner = learner_on(dtype=None)
    learner.join(NcclGroup(address="127.0.0.1", port=1, engines=1, workers=1))
    sender = learner._nccl
    update = learner.publish(1)
    assert update.backend == "nccl" and update.path is None
    with pytest.raises(AssertionError, match="version 1 is published, not 2"):
        learner.send(2)
    learner.send(1)
    assert list(sender.sent[0]) == [tensor.name for tensor in update.tensors]
    learner.close()
    assert sender.closed


def test_a_step_at_learning_rate_zero_says_that_it_did_not_move(learner_on):
    learner = learner_on(lr=0.0)
    before = learner.publish(1)
    learner.step(order_of(GROUPS))
    after = learner.publish(2)
    assert not after.moved and after.digest == before.digest
    assert (after.base_digest, after.base_version, after.delta_bytes) == (before.digest, 1, 0)


@pytest.mark.parametrize("algorithm", ["dr_grpo", "rloo"])
def test_every_algorithm_of_the_table_makes_a_step(learner_on, algorithm):
    assert learner_on(algorithm=algorithm).step(order_of(GROUPS)).metrics["learner/grad_norm"].value > 0


def test_the_real_model_agrees_with_transformers_on_packed_text(model_dir, tmp_path):
    """bf16 FSDP with shared prefixes against bf16 transformers, one row per answer: inside the first step's gate."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    prompt = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    base = random_group(0, rewards=(1.0, 0.0))
    trajectories = []
    for trajectory, text in zip(base.trajectories, ["3 + 4 = 7<|im_end|>", "The answer is 8."], strict=True):
        answer = tuple(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float() / 0.8
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
        spans = (msgspec.structs.replace(trajectory.completion.spans[-1], start=0, end=len(answer)),)
        completion = msgspec.structs.replace(
            trajectory.completion, token_ids=answer, logprobs=tuple(logprobs), spans=spans
        )
        trajectories.append(msgspec.structs.replace(trajectory, completion=completion))
    group = msgspec.structs.replace(
        base, prompt=msgspec.structs.replace(base.prompt, token_ids=prompt), trajectories=tuple(trajectories)
    )
    learner = make_learner(settings_for(model_dir, tmp_path, lr=1e-5, max_logprob_gap=0.1), [group], dtype=None)
    try:
        report = learner.step(order_of([group], first=True))
        assert report.metrics["policy/logprob_gap_mean/nats"].value < 0.1
        assert 0 < report.metrics["learner/grad_norm"].value < 1e3
    finally:
        learner.close()


def without_advantage(group, reward=0.0):
    trajectories = tuple(msgspec.structs.replace(t, reward=reward) for t in group.trajectories)
    return msgspec.structs.replace(group, trajectories=trajectories)


def zero_and_others():
    """Two groups that say nothing, and between them two that do."""
    return [without_advantage(GROUPS[0]), GROUPS[1], without_advantage(GROUPS[2], 1.0), GROUPS[3]]


class CountingFetch:
    """Remembers which groups a learner asked for."""

    def __init__(self, learner):
        self._fetch, self.ids = learner._fetch, []
        learner._fetch = self

    def __call__(self, ids):
        self.ids += ids
        return self._fetch(ids)


def test_what_has_no_gradient_is_neither_fetched_nor_computed_and_the_gradient_is_the_same(learner_on, monkeypatch):
    groups = zero_and_others()
    learner = learner_on(groups)
    fetched = CountingFetch(learner)
    report = learner.step(order_of(groups))
    assert fetched.ids == ["g1", "g3"]
    found = batch_gradients(learner_on(groups), groups)
    monkeypatch.setattr(Algorithm, "skips_zero_advantage", False)
    learner = learner_on(groups)
    fetched = CountingFetch(learner)
    whole = learner.step(order_of(groups))
    assert fetched.ids == ["g0", "g1", "g2", "g3"]
    assert_same(found, batch_gradients(learner_on(groups), groups))
    for name in ("learner/loss", "learner/grad_norm", "learner/useful/tokens", "learner/trained/tokens"):
        assert report.metrics[name].value == pytest.approx(whole.metrics[name].value, rel=1e-9)
    assert report.num_tokens == whole.num_tokens == whole.metrics["learner/computed/tokens"].value
    # 0.5 is the mean of 0, 1 and 0.5: single answers say nothing either
    assert report.metrics["learner/computed/tokens"].value == report.metrics["learner/useful/tokens"].value
    assert report.batch_digest != whole.batch_digest  # what was trained on differs in what was looked at


@pytest.mark.parametrize("packing", ["shared_prefix", "per_answer"])
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_neither_packing_nor_checkpointed_activations_change_the_gradient(learner_on, packing, checkpoint_activations):
    expected = batch_gradients(learner_on(), budget=1000)
    options = {"packing": packing, "checkpoint_activations": checkpoint_activations}
    assert_same(batch_gradients(learner_on(**options), budget=60), expected, relative=1e-6)  # Llama's norms are fp32


@pytest.mark.parametrize("algorithm", ["m2po", "dppo_tv"])
def test_a_loss_that_needs_every_token_gets_them(learner_on, algorithm):
    groups = zero_and_others()
    learner = learner_on(groups, algorithm=algorithm)
    fetched = CountingFetch(learner)
    learner.step(order_of(groups))
    assert fetched.ids == ["g0", "g1", "g2", "g3"]


def test_a_batch_without_any_gradient_makes_a_version_and_no_step(learner_on):
    quiet = [without_advantage(group) for group in GROUPS]
    learner = learner_on(quiet + GROUPS)
    learner.step(order_of(GROUPS))  # so that AdamW has momentum
    assert learner.publish(2).moved
    weights = weights_of(learner)
    learner._fetch = lambda ids: pytest.fail("nothing of it is needed")
    report = learner.step(order_of(quiet, step=2))
    torch.testing.assert_close(weights_of(learner), weights, rtol=0, atol=0)
    assert (report.version, report.num_tokens, report.trips) == (2, sum(g.num_tokens for g in GROUPS), ())
    values = {name: metric.value for name, metric in report.metrics.items()}
    assert values["learner/loss"] == values["learner/lr"] == values["learner/grad_norm"] == 0
    assert values["learner/computed/tokens"] == values["learner/useful/tokens"] == 0
    assert values["learner/trained/tokens"] == report.num_tokens and values["learner/ranks"] == 1
    assert all(torch.tensor(value).isfinite() for value in values.values())
    assert not learner.publish(3).moved and learner._steps_done == 1
    other = [without_advantage(group, 1.0) for group in GROUPS]
    assert learner.step(order_of(other, step=2)).batch_digest != report.batch_digest


def test_the_first_step_gate_waits_for_the_first_batch_with_something_to_score(learner_on):
    quiet = [without_advantage(group) for group in GROUPS]
    learner = learner_on(max_logprob_gap=0.05)
    learner.step(order_of(quiet, first=True))
    with pytest.raises(ValueError, match="learner.max_logprob_gap"):
        learner.step(order_of(GROUPS, step=2))
