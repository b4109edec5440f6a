"""This file lets the contract tests run on any reward: `pytest tests/contracts --reward path/to/file.py:function`."""

from __future__ import annotations


def pytest_addoption(parser):
    """--reward may be given several times; the built-ins are always tested."""
    parser.addoption(
        "--reward", action="append", default=[], help="a reward to test: name, module:function, file:function"
    )


def pytest_generate_tests(metafunc):
    """One test per built-in and per --reward."""
    if "use" in metafunc.fixturenames:
        from rewards.loading import BUILT_INS

        metafunc.parametrize("use", [*BUILT_INS, *metafunc.config.getoption("--reward", [])], scope="module")
