"""This file checks that configs are found, overridden and written back, and that mistakes are named with their fix."""

from __future__ import annotations

import re

import pytest

from rl.config_loading import dump_config, find_config, load_config, parse_config

BASE = """
run: {steps: 3}
model: {path: some/model, device: cpu}
sources:
  sums: {kind: reasoning_gym, dataset: chain_sum, levels: {easy: {max_terms: 2}}}
rewards: {functions: {correct: {use: reasoning_gym}}}
"""


def refusal(*overrides: str, text: str = BASE) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_config(text, "base.yaml", overrides)
    return str(caught.value)


def test_a_bare_name_means_a_shipped_config_wherever_one_stands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config("arithmetic").name == "arithmetic.yaml"
    assert load_config("smoke").run.name == "smoke"


def test_a_config_of_ones_own_comes_before_a_shipped_one_of_the_same_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "smoke.yaml").write_text(BASE)
    assert load_config("smoke").run.name == "run"


def test_a_missing_config_is_answered_with_the_nearest_name_and_all_names():
    names = "arithmetic, gsm8k_gpu, long_tail, slow_judge, smoke"
    with pytest.raises(ValueError, match=rf"did you mean arithmetic\?.*{names}"):
        find_config("arithmetik")


def test_an_unreadable_config_is_refused_by_name(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(ValueError, match=r"cannot read the config .*binary\.yaml"):
        load_config(str(path))


def test_overrides_reach_into_sections_and_create_absent_ones():
    config = parse_config(
        BASE, "b", ["generators.count=2", "learner.lr=2e-5", "sources.sums.levels.hard={max_terms: 3}"]
    )
    assert config.generators.count == 2
    assert config.learner.lr == 2e-5
    assert config.sources["sums"].levels["hard"] == {"max_terms": 3}


def test_a_later_override_wins_and_null_is_a_value():
    config = parse_config(BASE, "b", ["run.steps=4", "run.steps=5", "model.system_prompt=null"])
    assert (config.run.steps, config.model.system_prompt) == (5, None)


def test_numbers_in_scientific_notation_are_numbers_where_no_type_says_so():
    config = parse_config(BASE, "b", ["rewards.functions.correct.params={a: 1e-5, b: 2E3, c: 1e5x}"])
    assert config.rewards.functions["correct"].params == {"a": 1e-5, "b": 2000.0, "c": "1e5x"}


def test_what_is_written_out_is_read_back_alike():
    config = parse_config(
        BASE, "b", ["model.system_prompt='Größe: \\box{}\n'", "rewards.functions.correct.sources=[sums]"]
    )
    text = dump_config(config)
    assert parse_config(text, "resolved") == config
    assert "max_lag: 2" in text


@pytest.mark.parametrize("override", ["steps", "=3", "run..steps=3", ".=1"])
def test_an_override_of_another_form_is_refused(override):
    assert "not of the form section.key=value" in refusal(override)


def test_an_override_below_a_value_is_refused():
    assert "goes below model.path, which is 'some/model'" in refusal("model.path.x=3")


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("learner.lrr=3", ["learner.lrr is set to 3", "did you mean lr?", "learner takes: ranks"]),
        ("run.lr=1", ["run.lr", "did you mean learner.lr?"]),
        ("max_lag=3", ["did you mean staleness.max_lag?", "the top level takes: run"]),
        ("sources.sums.levle=3", ["sources.sums.levle is", "did you mean levels?"]),
        ("rewards.functions.correct.timeout=3", ["rewards.functions.correct.timeout", "did you mean timeout_s?"]),
        ("sources.sums.kind=jsnl", ["sources.sums.kind is 'jsnl'", "did you mean jsonl?"]),
        ("sources.more={path: x}", ["sources.more.kind is missing"]),
        ("sources.more={kind: jsonl}", ["sources.more.path is missing (the file to train on); add it"]),
        ("curriculum.name=bnd", ["curriculum.name is 'bnd'", "did you mean band?", "band, uniform"]),
        ("staleness.max_lag=-1", ["staleness.max_lag is -1", "greater than or equal to 0", "synchronous loop"]),
        ("run.steps=many", ["run.steps is 'many'", "valid integer", "optimizer steps"]),
        ("rollout.group_size=1", ["base.yaml: rollout.group_size is 1", "set rollout.group_size to 2 or more"]),
        ("curriculum.band_low=0.9", ["curriculum: band_low 0.9", "swap them"]),
        ("learner=3", ["learner is 3", "dictionary"]),
        ("algorithm.name=cipso", ["base.yaml: algorithm: name is 'cipso'", "did you mean cispo?", "scalerl"]),
        (
            "algorithm.loss.clip_hihg=3",
            ["algorithm.loss.clip_hihg is set to 3", "algorithm.loss takes: name, weight_low"],
        ),
        ("algorithm.loss.name=gpso", ["algorithm.loss.name is 'gpso'", "did you mean gspo?", "ppo_clip, decoupled"]),
        ("algorithm.loss={name: gspo, clip_low: 2}", ["algorithm.loss.clip_low is 2", "the trust region begins"]),
        ("algorithm.mask={hihg: 3}", ["algorithm.mask.hihg", "did you mean high?", "algorithm.mask takes: level, low"]),
        ("algorithm.kl={estimator: k2}", ["algorithm.kl.coefficient is missing (weight of the estimate in the loss)"]),
        ("sources.more={path: x}", ["sources.more.kind is missing; add kind: reasoning_gym or jsonl or hub"]),
    ],
)
def test_a_mistake_is_told_with_path_value_and_fix(override, fragments):
    message = refusal(override)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message and "pydantic" not in message


def test_several_mistakes_are_told_together_and_fit_a_screen():
    message = refusal(*(f"learner.wrong{number}=1" for number in range(30)))
    assert message.startswith("base.yaml has 30 problems:")
    assert message.endswith("and 22 more")
    assert message.count("\n") < 12


def test_a_key_given_twice_is_refused_with_both_lines():
    assert "key 'run' stands on line 2 and again on line 7" in refusal(text=BASE + "run: {steps: 4}\n")


@pytest.mark.parametrize("text", ["run: [1, 2", "a: b: c", "\tx: 1"])
def test_broken_yaml_is_refused_with_its_place(text):
    assert re.search(r"base\.yaml, line \d+, column \d+ is not YAML", refusal(text=text))


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b"])
def test_yaml_without_sections_is_refused(text):
    assert "start from configs/arithmetic.yaml" in refusal(text=text)
