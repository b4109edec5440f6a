"""This file tests rl/algorithm_config.py: names fill in their parts, parts may be replaced, nonsense is refused."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from rl.algorithm_config import PRESETS, AdvantageName, AggregationName, AlgorithmSection, refusals
from rl.section import Section


def section(**given) -> AlgorithmSection:
    return AlgorithmSection.model_validate(given)


def why_not(**given) -> str:
    with pytest.raises(ValidationError) as caught:
        section(**given)
    return str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_name_fills_in_its_parts_and_survives_being_written_out(name):
    filled = section(name=name)
    assert (filled.advantage, filled.aggregation) == (PRESETS[name]["advantage"], PRESETS[name]["aggregation"])
    assert PRESETS[name]["loss"].items() <= filled.loss.model_dump().items()
    assert AlgorithmSection.model_validate(filled.model_dump(mode="json")) == filled


def test_every_loss_has_a_name_that_trains_it():
    losses = {loss.model_fields["name"].default for loss in get_args(AlgorithmSection.model_fields["loss"].annotation)}
    assert {preset["loss"]["name"] for preset in PRESETS.values()} == losses


def test_every_advantage_and_aggregation_is_of_a_name_or_may_replace_one():
    for advantage in get_args(AdvantageName):
        assert section(advantage=advantage).advantage == advantage
    for aggregation in get_args(AggregationName):
        assert section(aggregation=aggregation).aggregation == aggregation


def test_null_takes_the_part_of_the_name():
    assert section(name="dapo", advantage=None, loss=None) == section(name="dapo")
    assert section(name=None) == section() == section(name="cispo")


def test_a_knob_comes_on_top_of_those_of_the_name():
    assert section(name="dapo", loss={"clip_low": 0.1}).loss.model_dump() == {
        "name": "ppo_clip",
        "clip_low": 0.1,
        "clip_high": 0.28,
        "dual_clip": None,
    }


def test_another_loss_brings_its_own_knobs():
    assert section(name="mis", loss={"name": "tis"}).loss.model_dump() == {
        "name": "tis",
        "level": "token",
        "weight_high": 2.0,
    }


@pytest.mark.parametrize("name", ["cipso", 3, ["grpo"]])
def test_an_unknown_name_is_refused_with_all_names(name):
    assert f"name is {name!r}, which is no algorithm" in why_not(name=name)
    assert "take one of: grpo, dapo" in why_not(name=name)


def test_an_unknown_name_is_answered_with_the_nearest():
    assert "did you mean cispo?" in why_not(name="cipso")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"name": "gspo", "aggregation": "token_mean"}, "set aggregation to sequence_mean"),
        ({"name": "gspo", "mask": {"level": "token"}}, "set mask.level to geometric or sequence"),
        ({"name": "icepop", "mask": {"level": "token"}}, "both leave out by r at token level"),
        ({"name": "mis", "mask": {"level": "sequence"}}, "both leave out by r at sequence level"),
        ({"name": "m2po", "mask": {"level": "token"}}, "lower loss.tau instead"),
        ({"name": "cispo", "mask": {"level": "token"}}, "set loss.name to icepop"),
        ({"name": "decoupled", "mask": {"level": "token", "high": 5}}, "mask.high 5.0 leaves loss.weight_high 5.0"),
        ({"name": "tis", "loss": {"level": "sequence"}, "mask": {"level": "sequence"}}, "nothing to cut at sequence"),
        ({"name": "grpo", "mask": {"level": "token", "low": 0.9, "high": 1.1}}, "inside ppo_clip's trust region"),
        ({"name": "decoupled", "loss": {"clip_high": 0.3}}, "take anchor log_linear"),
        ({"kl": {"coefficient": 0.1, "ema_decay": 0.9}}, "set kl.reference to ema"),
        ({"mask": {"low": 1, "high": 1}}, "leaves every token out"),
        ({"mask": {"low": 1.5}}, "less than or equal to 1"),
        ({"mask": {"high": 0.9}}, "greater than or equal to 1"),
        ({"name": "aipo", "loss": {"weight_high": 0.5}}, "greater than or equal to 1"),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused_with_reason_and_fix(given, reason):
    assert reason in why_not(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "gspo", "mask": {"level": "geometric"}, "mask_truncated": True},
        {"name": "icepop", "mask": {"level": "sequence"}},
        {"name": "cispo", "mask": {}},
        {"name": "cispo", "mask": {"level": "token", "high": 8}},
        {"name": "grpo", "mask": {"level": "token"}},
        {"name": "decoupled", "loss": {"anchor": "log_linear", "clip_high": 0.3}, "mask": {"level": "token"}},
        {"kl": {"coefficient": 0.1, "reference": "ema", "ema_decay": 0.9}},
    ],
)
def test_a_combination_that_does_is_not(given):
    assert section(**given)


@pytest.mark.parametrize(
    ("given", "max_lag", "weights", "overlong", "reason"),
    [
        ({"name": "max_rl"}, 2, [1.0, -0.1], False, "a negative weight in rewards.functions takes them below 0"),
        ({"name": "max_rl"}, 2, [1.0], True, "rewards.overlong takes them below 0"),
        ({"name": "decoupled", "loss": {"anchor": "log_linear"}}, 1, [1.0], False, "staleness.max_lag is 1"),
    ],
)
def test_what_does_not_fit_the_rest_of_a_run_is_refused(given, max_lag, weights, overlong, reason):
    (message,) = refusals(section(**given), max_lag, weights, overlong)
    assert reason in message and ";" in message


def test_what_fits_the_rest_of_a_run_is_not():
    for name in PRESETS:
        assert not list(refusals(section(name=name), 0, [1.0], overlong=False))
    log_linear = section(name="decoupled", loss={"anchor": "log_linear"})
    assert not list(refusals(log_linear, 2, [1.0, -1.0], overlong=True))


def test_a_section_is_strict_all_the_way_down():
    def walk(kind):
        yield kind
        for field in kind.model_fields.values():
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, Section):
                    yield from walk(part)

    assert {kind.model_config["extra"] for kind in walk(AlgorithmSection)} == {"forbid"}
