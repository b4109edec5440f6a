"""This file judges a final model, a program of its own: greedy answers to held-out prompts, by transformers alone.

python greedy_score.py MODEL_DIR HELD_OUT.jsonl MAX_TOKENS [LIMIT]      prints {level: [correct, total]}
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.last_number import is_right
from tests.benchmarks.trl_prompts import read_rows

BATCH = 32


def score(model_dir: str, rows: list[dict], max_tokens: int) -> dict[str, list[int]]:
    """Level -> right answers, and all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # its lines would mix with the answer
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        texts = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False) for row in batch
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(batch, answers, strict=True):
            counts[row["level"]][0] += is_right(answer, row["answer"])
            counts[row["level"]][1] += 1
    return dict(counts)


if __name__ == "__main__":
    model_dir, held_out, max_tokens, *limit = sys.argv[1:]
    rows = read_rows(Path(held_out))
    if limit:  # evenly over the file, which is sorted by level
        rows = rows[:: max(1, len(rows) // int(limit[0]))]
    print(json.dumps(score(model_dir, rows, int(max_tokens))))
