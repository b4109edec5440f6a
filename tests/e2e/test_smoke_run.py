"""The whole loop on real parts: vLLM, SmolLM2, Redis, Ray, two FSDP2 ranks; then a look at every promise."""

from __future__ import annotations

import json

import pandas
import pytest

REASONS = ("stale", "zero_advantage", "reward_failure", "aborted", "surplus", "oversize")


def test_a_smoke_run_trains_with_two_ranks_and_keeps_its_promises(rl):
    run = rl("run", "smoke")
    assert run.finish() == 0, run.output.read_text()
    metrics = run.metrics
    assert run.outcome["status"] == "finished" and list(metrics["step"]) == [1, 2, 3]
    assert (run.directory / "logs" / "learner_1.log").exists()

    # the lag is bounded, by default by two versions
    assert metrics["policy/lag_max/versions"].max() <= 2

    # groups and tokens balance at every step
    for _, row in metrics.iterrows():
        places = ("trained", "buffered", "in_flight", *(f"dropped/{reason}" for reason in REASONS))
        assert row["flow/groups/drawn"] == sum(row[f"flow/groups/{place}"] for place in places)
        places = ("trained", "buffered", *(f"dropped/{reason}" for reason in REASONS))
        assert row["flow/tokens/sampled"] == sum(row[f"flow/tokens/{place}"] for place in places)

    # engine and learner agree on what was sampled at the current version
    assert metrics["policy/logprob_gap_mean/nats"].iloc[0] < 0.1

    # every version that was delivered was verified, the last one included
    verified = run.events("weights_verified")
    assert verified[0]["version"] == 0 and verified[-1]["version"] == 3
    assert len({event["digest"] for event in verified}) == len(verified)

    # before and after were evaluated, each at one version
    evaluations = pandas.read_json(run.directory / "evaluations.jsonl", lines=True)
    assert evaluations["version"].iloc[0] == 0 and evaluations["version"].iloc[-1] == 3

    # the run directory holds everything, and nothing of the run is alive
    for name in ("config.yaml", "outcome.json", "events.jsonl", "rollouts/step_000001.jsonl"):
        assert (run.directory / name).exists()
    archived = pandas.concat(pandas.read_parquet(path) for path in (run.directory / "archive").iterdir())
    assert archived["group"].nunique() == 6 and set(archived["step"]) == {1, 2, 3}
    assert run.family() == []

    # the export is an ordinary Hugging Face model, and moved
    check_export(run.directory / "checkpoints" / "step_000003" / "export", run)


def check_export(folder, run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = (run.directory / "config.yaml").read_text()
    start = next(line.split(": ", 1)[1] for line in config.splitlines() if line.startswith("  path: "))
    before = AutoModelForCausalLM.from_pretrained(start)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False)
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert (model(ids).logits - before(ids).logits).abs().max() > 0


@pytest.mark.parametrize("setting", ["rewards.functions.correct.use=slow_reward.py:slow"])
def test_a_reward_that_does_not_import_is_refused_before_anything_starts(rl, setting):
    run = rl("run", "smoke", setting)
    assert run.finish(60) == 2
    told = json.loads((run.directory / "outcome.json").read_text())
    assert told["status"] == "refused" and "slow_reward.py" in told["first_error"]["message"]
    assert run.family() == []


@pytest.mark.gpu(count=2)
def test_on_gpus_the_weights_travel_by_nccl_and_are_verified_alike(rl):
    run = rl("run", "smoke", "model.device=cuda", "learner.ranks=1")
    assert run.finish() == 0, run.output.read_text()
    assert [event["version"] for event in run.events("weights_verified")] == [0, 1, 2, 3]
