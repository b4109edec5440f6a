"""This file tests learners/attention.py: whichever way shared prefixes are computed, they are the mask's."""

from __future__ import annotations

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from learners import attention
from learners.attention import Blocks, Causal, Flex, context_limit, pattern_for, similar
from learners.blocks import BlockOptions, prepare_blocks
from learners.layouts import Layout, RowLengths, pack
from learners.model import Policy
from tests.learners.test_layouts import share_of, split
from tests.learners.tiny import random_group, save_tiny_llama

CPU = torch.device("cpu")
LAYOUTS = {
    "answers of one length": Layout((RowLengths(5, (4, 4, 4)),)),
    "answers of any length": Layout((RowLengths(5, (3, 1, 40, 7, 38)), RowLengths(1, (2, 2)))),
    "one answer beside many": Layout((RowLengths(4, (6,)), RowLengths(3, (20, 1, 1)), RowLengths(9))),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def random_inputs(layout, heads=6, keys=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(layout.width)
    rows, width = len(layout.rows), layout.width
    return [
        torch.randn(rows, count, width, 8, generator=generator, dtype=dtype).requires_grad_()
        for count in (heads, keys, keys)
    ]


def by_mask(layout, query, key, value, scaling):
    """The definition: softmax over everything, with what must not be seen at minus infinity."""
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~layout.mask(), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def real(layout):
    """Which tokens are no padding, [B, L, 1, 1]."""
    return (layout.segments() >= 0)[:, :, None, None]


@each_layout
@pytest.mark.parametrize(("heads", "keys"), [(6, 2), (4, 4), (3, 1)])
def test_blocks_are_the_mask_with_their_gradients(layout, heads, keys):
    inputs = random_inputs(layout, heads, keys)
    expected = by_mask(layout, *inputs, 0.3) * real(layout)
    found = Blocks(layout).attend(*inputs, 0.3) * real(layout)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weights).sum(), inputs) for each in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@each_layout
@pytest.mark.parametrize(("heads", "keys"), [(4, 2), (6, 2)])
def test_flex_attention_is_the_mask(layout, heads, keys):
    """Forward only: on a CPU it has no backward pass."""
    inputs = [each.detach() for each in random_inputs(layout, heads, keys, torch.float32)]
    found = Flex(layout, CPU).attend(*inputs, 0.3) * real(layout)
    torch.testing.assert_close(found, by_mask(layout, *inputs, 0.3) * real(layout), rtol=1e-5, atol=1e-5)


def test_rows_of_plain_text_are_causal():
    layout = Layout((RowLengths(5, (4,)), RowLengths(12)))
    assert isinstance(pattern_for(layout, CPU), Causal)
    inputs = random_inputs(layout)
    order = torch.arange(12)
    causal = Layout((RowLengths(12),) * 2)
    assert (causal.mask()[0, 0] == (order[:, None] >= order)).all()
    torch.testing.assert_close(Causal().attend(*inputs, 0.3), by_mask(causal, *inputs, 0.3), rtol=1e-12, atol=1e-12)


def test_the_device_chooses_between_blocks_and_flex_attention(monkeypatch):
    layout = LAYOUTS["answers of one length"]
    assert isinstance(pattern_for(layout, CPU), Blocks)
    made = []
    monkeypatch.setattr(attention, "Flex", lambda *arguments: made.append(arguments))
    pattern_for(layout, torch.device("cuda"))
    assert made == [(layout, torch.device("cuda"))]


def test_an_answer_much_longer_than_others_is_computed_apart_from_them():
    assert similar([40, 300, 38, 290, 2]) == [[1, 3], [0, 2], [4]]
    assert similar([3, 16, 1]) == [[1, 0, 2]] and similar([]) == []


def test_nothing_of_the_size_of_a_rows_mask_is_made():
    """16 answers of 64 tokens behind 16: the mask over the row would have a million places."""
    layout = Layout((RowLengths(16, (64,) * 16),))
    pattern = Blocks(layout)
    pattern.attend(*random_inputs(layout, 4, 2), 0.3)
    assert layout.width**2 > 10**6 and sum(mask.numel() for mask in pattern._masks.values()) == 2 * 64 * 80


def test_the_same_inputs_give_the_same_bits_whatever_ran_before():
    layout = LAYOUTS["answers of any length"]
    inputs = random_inputs(layout, dtype=torch.float32)
    first = Blocks(layout).attend(*inputs, 0.3)
    Blocks(LAYOUTS["answers of one length"]).attend(*random_inputs(LAYOUTS["answers of one length"]), 0.3)
    assert torch.equal(Blocks(layout).attend(*inputs, 0.3), first)


@pytest.fixture(scope="module")
def model_of_two_layers(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def policy_of(model_dir, packing="shared_prefix", supported=True, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").eval()
    model._supports_attention_backend = supported
    prepare_blocks(model, BlockOptions(packing))
    return Policy(model)


def gradient_of(policy, packed):
    logprobs_N, _ = policy(*packed.inputs, 0.8)
    loss = (logprobs_N * packed.advantages_N * packed.weights_N).sum()
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(policy.parameters()))])


def test_a_models_gradient_is_that_of_one_padded_row_for_each_answer(model_of_two_layers):
    shares = [share_of(random_group(index, max_tokens=30)) for index in range(3)]
    apart = pack([row for share in shares for row in split(share)], version=1)
    together = pack(shares, version=1)
    expected = gradient_of(policy_of(model_of_two_layers, "per_answer"), apart)
    for policy in (policy_of(model_of_two_layers), policy_of(model_of_two_layers, supported=False)):
        found = gradient_of(policy, together)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_only_a_model_that_takes_an_attention_is_given_one(model_of_two_layers):
    name = "_attn_implementation"
    assert getattr(policy_of(model_of_two_layers).model.config, name) == attention.NAME
    assert getattr(policy_of(model_of_two_layers, supported=False).model.config, name) == "sdpa"
    assert getattr(policy_of(model_of_two_layers, "per_answer").model.config, name) == "sdpa"


def test_an_attention_with_something_added_to_it_is_refused():
    with pytest.raises(ValueError, match="softcap.*set learner.packing to per_answer"):
        attention._attention(torch.nn.Identity(), *random_inputs(LAYOUTS["answers of one length"]), None, softcap=30.0)


def test_layers_that_see_a_window_bound_the_context_of_shared_prefixes(model_of_two_layers):
    assert context_limit(LlamaConfig()) is None
    assert context_limit(MistralConfig(sliding_window=64)) == 64
    hybrid = LlamaConfig(layer_types=["full_attention", "linear_attention"], num_hidden_layers=2)
    with pytest.raises(ValueError, match="linear_attention.*set learner.packing to per_answer"):
        context_limit(hybrid)
    policy = policy_of(model_of_two_layers)
    policy.model.config.sliding_window = 8
    with pytest.raises(ValueError, match="see only 8 at once; set learner.packing to per_answer"):
        policy(*pack([share_of(random_group(0))], version=1).inputs, 0.8)
    alone = msgspec.structs.replace(random_group(0), trajectories=random_group(0).trajectories[:1])
    policy(*pack(split(share_of(alone)), version=1).inputs, 0.8)
