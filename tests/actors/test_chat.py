from __future__ import annotations

import shutil

import pytest

from actors.chat import ChatTokenizer
from rl.trajectory import Message, TextPart


def message(role: str, text: str) -> Message:
    return Message(role, (TextPart(text),))


def test_a_conversation_ends_where_the_answer_begins(model_dir):
    chat = ChatTokenizer(model_dir)
    ids = chat.render((message("system", "Be brief."), message("user", "What is 3+4?")))
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 3+4?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat._tokenizer.decode(ids) == expected


def test_a_given_template_takes_the_place_of_the_models_own(model_dir):
    chat = ChatTokenizer(model_dir, "Q: {{ messages[0].content }} A:")
    assert chat._tokenizer.decode(chat.render((message("user", "3+4?"),))) == "Q: 3+4? A:"


def test_a_tokenizer_without_a_chat_template_is_refused_with_a_way_out(model_dir, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(f"{model_dir}/{name}", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="no chat template.*instruction-tuned"):
        ChatTokenizer(str(tmp_path))
