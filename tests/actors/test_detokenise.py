"""This file holds the tests of actors/detokenise.py against vLLM's own writing, token by token, without an engine."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from actors.detokenise import Detokeniser


@pytest.fixture(scope="session")
def tokenizer(model_dir) -> Tokenizer:
    return AutoTokenizer.from_pretrained(model_dir).backend_tokenizer


def written_by_vllm(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    request = SimpleNamespace(request_id="", sampling_params=SamplingParams(), prompt_token_ids=prompt)
    writer = FastIncrementalDetokenizer(SimpleNamespace(_tokenizer=tokenizer), request)
    writer.update(answer, stop_terminated=False)
    return writer.get_next_output_text(finished=True, delta=False)


def test_any_tokens_become_the_text_that_vllm_writes(tokenizer):
    rng = random.Random(0)
    fragments = tokenizer.encode("𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🦆🧮 żółć 数学 <|im_end|> word").ids  # characters of several tokens
    for _ in range(300):
        vocabulary = rng.choice((fragments, range(tokenizer.get_vocab_size())))
        prompt, answer = (rng.choices(vocabulary, k=rng.randrange(length)) for length in (6, 12))
        assert Detokeniser(tokenizer).text(prompt, answer) == written_by_vllm(tokenizer, prompt, answer)


def test_a_space_that_belongs_to_the_first_word_depends_on_the_prompt():
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2}, unk_token="s"))
    words.decoder = decoders.Metaspace()
    assert Detokeniser(words).text([0], [1, 2]) == " twos" == written_by_vllm(words, [0], [1, 2])
    assert Detokeniser(words).text([], [1, 2]) == "twos"


async def test_the_answers_of_a_group_are_written_in_their_order(tokenizer):
    answers = [tokenizer.encode(text).ids for text in ("one", "", "three more")]
    assert await Detokeniser(tokenizer).texts([1, 2], answers) == ["one", "", "three more"]
