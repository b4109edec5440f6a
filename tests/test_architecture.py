"""This file asserts the shape of the code from its syntax trees: who imports whom, budgets, no unread knob."""

from __future__ import annotations

import ast
import copy
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("rl", "actors", "learners", "rewards")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_COMPLEXITY = 400, 60, 7, 10

MAY_IMPORT = {
    "rewards": {"rewards"},
    "rl": {"rl"},
    "actors": {"actors", "rl", "rewards"},
    "learners": {"learners", "rl"},
}
MAY_ALSO_IMPORT = {
    "rl/launch.py": {"actors", "learners", "rewards"},
    "rl/fleet_settings.py": {"actors", "learners", "rewards"},
    "rl/wiring.py": {"actors", "learners"},
    "rl/screen.py": {"actors", "rewards"},
    "rl/cli.py": {"rewards"},
}
# the loops and the command: nothing below may know them
TOP_OF_RL = ("rl.run", "rl.wiring", "rl.launch", "rl.screen", "rl.cli", "rl.dashboard")
VENDOR_DOORS = {
    "vllm": {
        "actors/engine_arguments.py",
        "actors/vllm_engine.py",
        "actors/weight_receiver.py",
        "actors/worker_extension.py",
        "learners/nccl_sender.py",
    },
    "redis": {"rl/buffer.py", "rl/redis_client.py"},
    "ray": {"rl/launch.py", "actors/generator_process.py", "learners/fleet.py"},
}
HEAVY = {"torch", "transformers", "vllm", "accelerate", "safetensors"}
SLOW = HEAVY | {"ray", "numpy", "pandas", "datasets", "reasoning_gym", "math_verify", "sympy", "redis", "pyarrow"}
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: pathlib.Path) -> str:
    return name_of(path).removesuffix(".py").replace("/", ".")


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(tree: ast.AST) -> set[str]:
    """Every dotted name that is imported anywhere below, those of `from a import b` as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: without function bodies and without `if TYPE_CHECKING`."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...
        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

    return Prune().visit(copy.deepcopy(tree))


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def parameters(function: Function) -> int:
    spec = function.args
    names = [arg.arg for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")]) + bool(spec.vararg) + bool(spec.kwarg)


def complexity(function: Function) -> int:
    """McCabe's number as ruff counts it: 1, and one more for each branch, loop, handler and case."""
    return 1 + sum(isinstance(node, BRANCHES) for node in ast.walk(function))


def every_module(*packages: str) -> pytest.MarkDecorator:
    chosen = [path for path in MODULES if name_of(path).split("/")[0] in (packages or PACKAGES)]
    return pytest.mark.parametrize("path", chosen, ids=name_of)


@every_module()
def test_imports_of_ours_follow_the_table(path):
    name, names = name_of(path), imports(tree_of(path))
    allowed = MAY_IMPORT[name.split("/")[0]] | MAY_ALSO_IMPORT.get(name, set())
    assert tops(names) & set(PACKAGES) <= allowed, f"{name} may import only {sorted(allowed)} of ours"
    if not name.startswith("rl/"):
        above = {top for top in TOP_OF_RL for imported in names if f"{imported}.".startswith(f"{top}.")}
        assert not above, f"{name} reaches up to {sorted(above)}"


@every_module()
def test_vendors_stay_behind_their_doors(path):
    name = name_of(path)
    through = {vendor for vendor, doors in VENDOR_DOORS.items() if name not in doors} & tops(imports(tree_of(path)))
    assert not through, f"{name} imports {sorted(through)}; the doors are {VENDOR_DOORS}"


@every_module("rl")
def test_the_run_needs_no_model_library(path):
    tree = tree_of(path)
    allowed = HEAVY if name_of(path) == "rl/launch.py" else set()
    assert not tops(imports(tree)) & (HEAVY - allowed), f"{name_of(path)} is part of the light core"
    assert not tops(imports(at_import(tree))) & HEAVY, f"{name_of(path)} imports a model library at import time"


@every_module()
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@every_module()
def test_functions_stay_small(path):
    for function in functions(tree_of(path)):
        where = f"{name_of(path)}:{function.lineno} {function.name}"
        assert length(function) <= MAX_FUNCTION_LINES, f"{where} has {length(function)} lines"
        assert parameters(function) <= MAX_PARAMETERS, f"{where} has {parameters(function)} parameters"
        assert complexity(function) <= MAX_COMPLEXITY, f"{where} has complexity {complexity(function)}"


@every_module()
def test_a_module_says_first_what_it_does(path):
    assert (ast.get_docstring(tree_of(path)) or "").startswith("This file "), (
        f"{name_of(path)}: 'This file …' is missing"
    )


@every_module()
def test_public_functions_and_classes_are_documented(path):
    for node in tree_of(path).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name_of(path)}:{node.lineno} {node.name} has no docstring"


@every_module()
def test_no_module_is_named_like_one_of_the_standard_library(path):
    assert path.stem not in sys.stdlib_module_names


@every_module()
def test_a_module_is_imported_by_a_test(path):
    assert dotted(path) in {name for test in TESTS for name in imports(tree_of(test))}, (
        f"no test imports {dotted(path)}"
    )


def test_package_files_are_empty_and_tests_have_none():
    for package in PACKAGES:
        for init in (ROOT / package).rglob("__init__.py"):
            assert not init.read_text(), f"{name_of(init)} is not empty"
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_config_field_is_read_somewhere():
    from rl.config import RunConfig

    # Keyed by field name alone: two sections that share a name (weight, every_steps) vouch for each other.
    read = {
        node.attr
        for path in MODULES
        if name_of(path) != "rl/config.py"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    } | set(RunConfig.model_fields)
    derived = {  # what only a property of rl/config.py reads, if that property is itself read
        attribute.attr
        for node in ast.walk(tree_of(ROOT / "rl/config.py"))
        if isinstance(node, ast.FunctionDef) and node.name in read
        for attribute in ast.walk(node)
        if isinstance(attribute, ast.Attribute)
    }
    dead = [path for path, name in config_fields(RunConfig) if name not in read | derived]
    assert not dead, f"nothing reads {dead}: use them or delete them"


def config_fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, field name) of every leaf; union members and dictionary values count once each."""
    for name, field in section.model_fields.items():
        below = [found for found in nested_sections(field.annotation)]
        for found in below:
            yield from config_fields(found, f"{prefix}{name}.")
        if not below:
            yield f"{prefix}{name}", name


def nested_sections(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from nested_sections(part)


def test_the_check_path_imports_nothing_slow():
    # In a child: this process has long imported everything.
    program = "import sys, rl.check, rl.config_loading, rl.cli, rewards.loading; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert not SLOW & set(run.stdout.split())


class TestTheRulesThemselves:
    def test_imports_are_seen_inside_functions_too(self):
        tree = ast.parse("def late():\n    from a.b import c\n    import d.e")
        assert imports(tree) == {"a.b", "a.b.c", "d.e"}

    def test_what_runs_at_import_excludes_functions_and_type_checking(self):
        source = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    import c\nclass D:\n    import e"
        assert imports(at_import(ast.parse(source))) == {"a", "e"}

    def test_complexity_counts_every_branch_and_loop(self):
        (function,) = functions(
            ast.parse("def f(x):\n    if x:\n        for z in x:\n            pass\n    elif z: pass")
        )
        assert complexity(function) == 4

    def test_self_is_no_parameter_but_starred_ones_are(self):
        (function,) = functions(ast.parse("def f(self, a, *b, c=1, **d): ..."))
        assert parameters(function) == 4
