"""A chapter's reproduction card: what it read, ran with and wrote, and how long it took."""

from __future__ import annotations

import platform
import sys
import time
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapter_twin.cli.doctor import core_packages
from adapter_twin.tables import datasets

DATA_SUFFIXES = (".parquet", ".csv", ".json", ".yaml")

SHOWN_DIGITS = 12
"""A SHA-256 is shown by its first characters."""


_opened_s: dict[Path, float] = {}
"""Data files were last opened at these times of `time.perf_counter`."""


@cache
def _listen() -> None:
    """Have the interpreter report the files that it opens (PEP 578): once, for hooks stay."""
    sys.addaudithook(_hear)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and arguments[1] in ("r", "rb") and isinstance(arguments[0], str | Path):
        path = Path(arguments[0])
        if path.suffix in DATA_SUFFIXES:
            _opened_s[path] = time.perf_counter()


class Watch:
    """From its creation on: the data files that this process opens, and the time that passes.

    The interpreter itself tells of them, so that a card lists what was read and not what somebody
    remembered to list.
    """

    def __init__(self) -> None:
        _listen()
        self.started_s = time.perf_counter()

    def inputs(self) -> dict[str, Path]:
        """Return the data files that were read, by a name that does not depend on the machine."""
        opened = [path for path, at_s in _opened_s.items() if at_s >= self.started_s]
        named = ((_name(path), path) for path in opened)
        return dict(sorted((name, path) for name, path in named if name is not None))


def _name(path: Path) -> str | None:
    """Return a data file's name in the repository or by its data set; None for other files."""
    if not path.is_file():
        return None
    own = [datasets.REPOSITORY / folder for folder in ("data", "designs", "examples")]
    for root, shown_from in (
        *((folder, datasets.REPOSITORY) for folder in own),
        *((root, root) for root in datasets.roots()),
    ):
        if path.absolute().is_relative_to(root):
            return str(path.absolute().relative_to(shown_from))
    return None


def card(watch: Watch, parameters: dict[str, Any], seeds: str, tables: list[Path]) -> str:
    """Return a chapter's reproduction card in MyST Markdown.

    Parameters
    ----------
    watch : Watch
    parameters : dict
        What papermill set.
    seeds : str
        Which seeds the chapter used, in words.
    tables : list of pathlib.Path
        The result tables that it wrote.
    """
    packages = ", ".join(f"{name} {version(name)}" for name in ["adapter-twin", *core_packages()])
    facts = {
        "parameters": ", ".join(f"`{name} = {value!r}`" for name, value in parameters.items()),
        "seeds": seeds,
        "run time": f"{time.perf_counter() - watch.started_s:,.0f} s",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "packages": packages,
        "inputs": _listed(watch.inputs()),
        "result tables": _listed({path.name: path for path in sorted(tables)}),
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f":::{{dropdown}} Reproduction card\n| what | value |\n|---|---|\n{rows}\n:::"


def _listed(files: dict[str, Path]) -> str:
    """Return names of files with the beginning of their SHA-256."""
    hashes = {name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    listed = (f"{name} (`{digest[:SHOWN_DIGITS]}`)" for name, digest in hashes.items())
    return ", ".join(listed) or "none"
