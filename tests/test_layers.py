"""What may import what: data flows one way, and the core needs neither torch nor vllm."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapter_twin.tables import datasets

FILES = [
    path for top in ("adapter_twin", "study") for path in (datasets.REPOSITORY / top).rglob("*.py")
]
LAYERS = (
    ("errors", "parallel"),
    ("workload",),
    ("tables",),
    ("laws",),
    ("twin",),
    ("service",),
    ("calibrate",),
    ("capacity",),
    ("plan",),
    ("shrink",),
    ("learn",),
    ("fleet",),
    ("measure",),
    ("prove",),
    ("cli",),
)
"""The folders of the package from the ground up: each imports only from itself and from below."""

FLOOR = {name: floor for floor, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(datasets.REPOSITORY).with_suffix("").parts
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


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def importers_of(package: str) -> set[str]:
    """Name the modules outside `package` that import it."""
    return {
        module
        for module, names in GRAPH.items()
        if not within(module, package) and any(within(name, package) for name in names)
    }


def floor(name: str) -> int | None:
    top, _, rest = name.partition(".")
    return FLOOR.get(rest.partition(".")[0]) if top == "adapter_twin" else None


def test_type_checkers_imports_do_not_count_and_late_ones_do() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\n"
        "else:\n    import b\ndef f():\n    from c import d\n"
    )
    assert set(imports(source)) == {"typing.TYPE_CHECKING", "b", "c.d"}


def test_every_folder_of_the_package_has_its_place() -> None:
    folders = {name.split(".")[1] for name in GRAPH if name.startswith("adapter_twin.")}
    assert folders - {"__main__"} == set(FLOOR)


@pytest.mark.parametrize("module", sorted(name for name in GRAPH if floor(name) is not None))
def test_every_import_points_down(module: str) -> None:
    own = floor(module)
    assert own is not None
    above = [name for name in GRAPH[module] if (floor(name) or 0) > own]
    assert above == []


def test_only_the_command_line_and_the_proofs_measure() -> None:
    allowed = ("adapter_twin.cli", "adapter_twin.prove")
    others = [
        name
        for name in importers_of("adapter_twin.measure")
        if not any(within(name, package) for package in allowed)
    ]
    assert others == []


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_only_measuring_imports_the_engine(engine: str) -> None:
    assert all(within(name, "adapter_twin.measure") for name in importers_of(engine))


def test_the_package_does_not_know_the_study() -> None:
    assert importers_of("study") == set()


def test_only_main_imports_the_command_line() -> None:
    users = importers_of("adapter_twin.cli")
    assert {name for name in users if within(name, "adapter_twin")} == {"adapter_twin.__main__"}


def test_file_names_are_unique() -> None:
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, times in names.items() if times > 1] == []


def test_class_names_are_unique() -> None:
    trees = [ast.parse(path.read_text()) for path in FILES]
    names = Counter(
        node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    )
    assert [name for name, times in names.items() if times > 1] == []


def test_the_root_shows_the_data_flow() -> None:
    root = datasets.REPOSITORY / "adapter_twin"
    assert len(list(root.glob("*.py"))) <= 8


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_numerical_library() -> None:
    assert not {"numpy", "pandas", "numba", "scipy"} & loaded_by("import adapter_twin")


@pytest.mark.parametrize("module", ["twin.simulate", "laws"])
def test_simulating_needs_no_tables(module: str) -> None:
    tables = {"pandas", "pandera", "pyarrow", "matplotlib"}
    assert not tables & loaded_by(f"import adapter_twin.{module}")


def test_help_loads_no_numerical_library() -> None:
    heavy = {"numpy", "pandas", "numba", "scipy", "sklearn", "pandera", "matplotlib"}
    assert not heavy & loaded_by("import adapter_twin.cli")
