"""Output of the command line: tables for people, strict JSON for programs, checks on targets."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from adapter_twin.errors import require

# rich is imported late: `--help` does not need its tables.
if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table


SCHEMA_VERSION = 2
"""A higher one tells that a key is gone or means something else."""


UNITS = {
    **dict.fromkeys(("request_throughput", "request_rate"), "requests/s"),
    **dict.fromkeys(("throughput", "_tokens_per_s"), "tokens/s"),
    **dict.fromkeys(("max_model_len", "_tokens"), "tokens"),
    **dict.fromkeys(("utilisation", "headroom", "attainment"), "%"),
    **dict.fromkeys(("probability", "share", "hit_rate"), "%"),
    **{f"_{unit.lower()}": unit for unit in ("bytes", "GiB", "MiB", "ms", "s")},
}
"""Units by how names end. Endings with an underscore are units; shares are shown in percent."""


def check_target(path: Path | None, *suffixes: str) -> None:
    """Refuse a place that cannot be written to before the work begins.

    Parameters
    ----------
    path : pathlib.Path, optional
        A file to be written; without `suffixes`, a folder to be made or filled.
    suffixes : str

    Raises
    ------
    AdapterTwinError
    """
    if path is None:
        return
    parent = path.absolute().parent
    require(parent.is_dir(), f"{path}: the folder {path.parent} does not exist; create it first")
    target = path if path.exists() else parent
    require(os.access(target, os.W_OK), f"{path}: cannot be written to; choose another place")
    if suffixes:
        require(path.suffix in suffixes, f"{path}: name the file {' or '.join(suffixes)}")
        require(not path.is_dir(), f"{path}: is a folder; name a file in it")
    else:
        require(not path.is_file(), f"{path}: is a file; name a folder")


def working(text: str) -> AbstractContextManager[Any]:
    """Show that something is going on, where stderr is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


def print_json(content: Mapping[str, Any]) -> None:
    """Print strict JSON with its `SCHEMA_VERSION`: what is not finite is null."""
    content = {"schema_version": SCHEMA_VERSION, **content}
    plain = to_jsonable_python(content, inf_nan_mode="null", fallback=lambda number: number.item())
    print(json.dumps(plain, indent=2, allow_nan=False))


def tell(content: Mapping[str, Any], as_json: bool, show: Callable[..., None], *more: Any) -> None:
    """Print what a verb has found: JSON, or what `show` makes of it for people."""
    if as_json:
        print_json(content)
    else:
        show(content, *more)


def print_table(table: pd.DataFrame, title: str) -> None:
    """Print a table for people, units in its header."""
    console, shown = _console(), _make_table(table, title)
    if console.measure(shown, options=console.options.update(width=1000)).maximum > console.width:
        shown = _make_table(table, title, "\n")  # headers break between words, not anywhere
    console.print(shown, "")


def print_each(table: pd.DataFrame, column: str, title: str) -> None:
    """Print a table for each value of a column."""
    for value, part in table.groupby(column, sort=False, observed=True):
        print_table(part.drop(columns=column), f"{title}: {value}")


def print_mapping(content: Mapping[str, Any], title: str) -> None:
    """Print names, with their units, and values for people."""
    import pandas as pd

    rows = [(in_words(name), _cell(value, name)) for name, value in content.items()]
    shown = _make_table(pd.DataFrame(rows, columns=["name", "value"]), title)
    shown.show_header = False
    _console().print(shown, "")


def print_text(text: str) -> None:
    """Print a sentence for people, wrapped where a terminal ends."""
    _console().print(text, markup=False, highlight=False, soft_wrap=not sys.stdout.isatty())


def print_command(*words: str) -> None:
    """Print a command to copy: lines of a shell, a flag and its value on one."""
    text = re.sub(r"(--[\w-]+) (?!-)", "\\1\N{NO-BREAK SPACE}", shlex.join(words))
    lines = textwrap.wrap(text, 78, break_long_words=False, break_on_hyphens=False)
    print(" \\\n  ".join(lines).replace("\N{NO-BREAK SPACE}", " "), end="\n\n")


def figures(content: Mapping[str, Any], *names: str) -> str:
    """Return those of the figures that there are, in words.

    >>> figures({"mean_ttft_ms": 79.8, "slo_attainment": 0.995}, "mean_ttft_ms", "slo_attainment")
    'mean TTFT 79.8 ms, SLO attainment 99.5 %'
    """
    told = []
    for name in (name for name in names if name in content):
        label, _, unit = in_words(name).partition(", ")
        told.append(f"{label} {_cell(content[name], name)} {unit}".rstrip())
    return ", ".join(told)


def in_words(name: str) -> str:
    """Return a figure's name with its unit; vLLM's flags keep their names.

    >>> in_words("p99_ttft_ms"), in_words("total_throughput"), in_words("max_loras")
    ('p99 TTFT, ms', 'total throughput, tokens/s', 'max_loras')
    """
    ending = _ending(name)
    if ending.startswith("_"):
        name = name.removesuffix(ending)
    if not name.startswith("max_"):
        words = name.replace("_", " ")
        name = re.sub(r"\b(ttft|itl|tpot|kv|slo|gpu)\b", lambda word: word[0].upper(), words)
    return f"{name}, {UNITS[ending]}" if ending else name


def _ending(name: str) -> str:
    return next((ending for ending in UNITS if name.endswith(ending)), "")


def _console() -> Console:
    from rich.console import Console

    # a pipe has no width; fold nothing that a file can hold
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _make_table(table: pd.DataFrame, title: str, between: str = " ") -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name, kind in table.dtypes.items():
        side: Any = "right" if kind.kind in "iuf" else "left"
        header = in_words(str(name)).replace(" ", between)
        shown.add_column(header, justify=side, overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(
            *(escape(_cell(one, str(name))) for name, one in zip(table, row, strict=True))
        )
    return shown


def _cell(value: Any, name: str) -> str:
    """Return a value with four digits, and whole where it has more before the point."""
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    if not math.isfinite(value):
        return "–"
    value *= 100 if UNITS.get(_ending(name)) == "%" else 1
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
