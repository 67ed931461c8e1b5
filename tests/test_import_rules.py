"""What may import what: data flows one way, and the core needs neither torch nor vllm."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapter_twin

PACKAGE = Path(adapter_twin.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
DESCRIPTION = ("config", "strict", "scenario", "lengths", "workload", "metrics", "models")
"""The lower layer: what is asked, what traffic it is, how it is scored."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """Yield the modules that code imports when it runs: not those for type checkers only."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{name.name}" for name in node.names)
        pending += ast.iter_child_nodes(node)


GRAPH = {module_name(path): set(imports(path.read_text())) for path in FILES}


def importers_of(package: str, outside: str = "") -> list[str]:
    """Name the modules that import `package`, but for those inside `outside`."""
    return [
        module
        for module, names in GRAPH.items()
        if not (outside and within(module, outside)) and any(within(n, package) for n in names)
    ]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_type_checkers_imports_do_not_count_and_late_ones_do() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\n"
        "else:\n    import b\ndef f():\n    from c import d\n"
    )
    assert set(imports(source)) == {"typing.TYPE_CHECKING", "b", "c.d"}


def test_nothing_imports_profiling() -> None:
    profiling = "adapter_twin.profiling"
    # A verb of the command line may start it.
    assert set(importers_of(profiling, outside=profiling)) <= {"adapter_twin.cli.measure"}


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_the_core_never_imports_the_engine(engine: str) -> None:
    assert importers_of(engine, outside="adapter_twin.profiling") == []


@pytest.mark.parametrize("name", DESCRIPTION)
def test_the_lower_layer_knows_neither_twin_nor_calibration(name: str) -> None:
    module = f"adapter_twin.{name}"
    for upper in ("twin", "calibration", "predict", "validate", "cli"):
        assert module not in importers_of(f"adapter_twin.{upper}")


@pytest.mark.parametrize("name", ["scheduler", "clock"])
def test_the_policy_knows_no_calibration(name: str) -> None:
    assert f"adapter_twin.twin.{name}" not in importers_of("adapter_twin.calibration")


@pytest.mark.parametrize("upper", ["predict", "validate", "doctor", "report"])
def test_only_the_command_line_and_those_above_it_use_the_verbs(upper: str) -> None:
    below = ("adapter_twin.twin", "adapter_twin.calibration", "adapter_twin.datasets")
    users = importers_of(f"adapter_twin.{upper}")
    assert not [user for user in users if any(within(user, package) for package in below)]


def test_only_main_imports_the_command_line() -> None:
    cli = "adapter_twin.cli"
    assert importers_of(cli, outside=cli) == ["adapter_twin.__main__"]


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_numerical_library() -> None:
    assert not {"numpy", "pandas", "numba", "scipy"} & loaded_by("import adapter_twin")


@pytest.mark.parametrize("module", ["twin.simulate", "calibration"])
def test_simulating_needs_no_tables(module: str) -> None:
    tables = {"pandas", "pandera", "pyarrow", "matplotlib"}
    assert not tables & loaded_by(f"import adapter_twin.{module}")


def test_help_loads_no_numerical_library() -> None:
    heavy = {"numpy", "pandas", "numba", "scipy", "sklearn", "pandera", "matplotlib"}
    assert not heavy & loaded_by("import adapter_twin.cli")
