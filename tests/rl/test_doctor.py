"""This file checks that the preflight recognises each trap and says how to get out of it."""

from __future__ import annotations

import pathlib

import pytest
from rich.console import Console

from rl import doctor
from rl.config import RunConfig
from rl.config_loading import parse_config

ROOT = pathlib.Path(doctor.__file__).parent.parent
GIB = doctor.GIB


@pytest.fixture
def config(tmp_path) -> RunConfig:
    text = """
run: {steps: 4}
model: {path: someone/small-135M, device: cpu}
sources: {sums: {kind: reasoning_gym, dataset: chain_sum, levels: {easy: {}}}}
rewards: {functions: {correct: {use: reasoning_gym}}}
"""
    return parse_config(text, "text", [f"run.dir={tmp_path}/not/yet/there"])


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@pytest.mark.parametrize(("version", "severity"), [((3, 10, 12), "error"), ((3, 11, 0), "ok"), ((3, 12, 1), "ok")])
def test_python_below_3_11_is_an_error(version, severity):
    assert doctor.judge_python(version).severity == severity


def test_packages_are_compared_with_their_pins():
    pins = {"ray": "2.60.0", "torch": "2.13.0", "redis": "8.1.0"}
    assert doctor.judge_packages(pins, pins | {"torch": "2.13.0+cpu"})[0].severity == "ok"
    missing, other = doctor.judge_packages(pins, {"torch": "2.12.0", "redis": "8.1.0"})
    assert (missing.severity, missing.fact) == ("error", "ray 2.60.0 is not installed")
    assert (other.severity, other.fact) == ("warning", "torch is 2.12.0, pinned is 2.13.0")


def test_a_python_without_our_distribution_is_an_error():
    (finding,) = doctor.judge_packages({}, {"torch": "2.13.0"})
    assert finding.severity == "error" and "make venv" in finding.fix


def test_a_cuda_torchvision_beside_a_cpu_torch_is_named_with_its_removal():
    finding = doctor.judge_cuda_traps({"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"})
    assert finding.severity == "error"
    assert finding.fix.startswith("pip uninstall -y torchvision;")
    assert doctor.judge_cuda_traps({"torch": "2.13.0", "torchvision": "0.28.0"}).severity == "ok"
    assert doctor.judge_cuda_traps({"torch": "2.13.0+cpu"}).severity == "ok"


def test_a_local_module_that_hides_a_library_is_found(tmp_path):
    (tmp_path / "datasets.py").touch()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    (tmp_path / "torch").mkdir()  # a mere folder hides nothing
    findings = doctor.judge_shadowing([tmp_path], ROOT)
    assert [finding.severity for finding in findings] == ["error", "error"]
    assert {word for finding in findings for word in finding.fact.split() if word in doctor.SHADOWABLE} == {
        "datasets",
        "ray",
    }


def test_a_foreign_package_of_our_name_is_found(tmp_path):
    assert doctor.judge_shadowing([], ROOT)[0].severity == "ok"
    assert len(doctor.judge_shadowing([], tmp_path)) == len(doctor.OUR_PACKAGES)


def test_more_computing_threads_than_cores_is_a_warning(config):
    assert doctor.judge_cores(2, config).severity == "ok"
    assert doctor.judge_cores(1, config).severity == "warning"


def test_too_few_gpus_is_an_error_only_where_gpus_are_wanted(config):
    assert doctor.judge_gpus((), config).severity == "ok"
    on_cuda = changed(config, "model", device="cuda")
    assert doctor.judge_gpus(("H100, 80 GiB",), on_cuda).severity == "error"
    assert doctor.judge_gpus(("H100, 80 GiB",) * 2, on_cuda).severity == "ok"


@pytest.mark.parametrize(("free", "needed", "severity"), [(2, 1, "ok"), (1, 2, "error"), (1, None, "ok")])
def test_space_is_compared_with_the_need(free, needed, severity):
    finding = doctor.judge_space("disk", free * GIB, needed and needed * GIB, "free some")
    assert finding.severity == severity
    assert bool(finding.fix) == (severity == "error")


@pytest.mark.parametrize(
    ("scope", "capable", "severity"),
    [
        (0, False, "ok"),
        (1, True, "ok"),
        (1, False, "warning"),
        (2, True, "ok"),
        (2, False, "warning"),
        (3, True, "warning"),
    ],
)
def test_a_kernel_that_hides_stacks_is_a_warning_with_its_fix(scope, capable, severity):
    finding = doctor.judge_stacks(scope, capable)
    assert finding.severity == severity
    assert bool(finding.fix) == (severity == "warning") and ("ptrace_scope" in finding.fact) == (severity == "warning")


def test_an_embedded_redis_needs_its_binary_and_a_configured_one_does_not(config, monkeypatch):
    def nothing_found() -> str:
        raise ValueError("no redis-server was found")

    monkeypatch.setattr(doctor, "find_binary", nothing_found)
    assert doctor.redis_finding(config).severity == "error"
    assert doctor.redis_finding(changed(config, "buffer", redis="redis://elsewhere:6379")).severity == "ok"


def test_no_driver_means_no_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.visible_gpus() == ()


def test_gpus_are_listed_as_the_driver_says(monkeypatch, tmp_path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'H100, 81559 MiB'\necho 'H100, 81559 MiB'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.visible_gpus() == ("H100, 81559 MiB",) * 2


def test_this_machine_is_examined_from_python_to_ports(config):
    findings = doctor.examine(config)
    names = {finding.name for finding in findings}
    assert {"python", "imports", "cores", "gpus", "memory", "disk", "redis", "ports", "stacks"} <= names
    assert all(finding.fix for finding in findings if finding.severity != "ok")


def test_findings_are_shown_with_their_fix_even_where_they_hold_brackets():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(doctor.render([doctor.Finding("redis", "error", "not [found]", "install it")]))
    assert "not [found]" in capture.get() and "-> install it" in capture.get()
