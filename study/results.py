"""Result tables of the study: made anew, or read as recorded where that takes long.

``python -m study.results``, after ``make reproduce FULL=1``, records its results: tables and
times to ``data/expected/``, pictures to ``book/images/``, accuracy and times to ``README.md``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from adapter_twin.errors import AdapterTwinError
from adapter_twin.tables import datasets
from study.card import Watch, card

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPECTED = datasets.REPOSITORY / "data" / "expected"
IMAGES = datasets.REPOSITORY / "book" / "images"
README = datasets.REPOSITORY / "README.md"
COMMANDS = {
    "usual": "make reproduce",
    "quick": "make reproduce QUICK=1",
    "full": "make reproduce FULL=1",
}
"""Each size of the study and what makes it; ``timings/<size>.csv`` holds the times of its steps."""

MEASURES = {
    "mape": "MAPE, %",
    "median_error": "median error, %",
    "within_25": "runs within 25 %, %",
    "macro_f1": "macro-F1",
    "right": "right, %",
    "max_error": "largest error, %",
}
AT_LEAST = ("within_25", "macro_f1", "right")
"""Measures that are to be reached; the others are not to be passed."""


class Note(str):
    """Markdown that a notebook shows as text."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


class Results:
    """The results of one run of the study.

    Parameters
    ----------
    folder : str or pathlib.Path
        Where tables and pictures go, relative to the repository; a small version's go apart.
    quick : bool
        The small version.
    full : bool
        Make the tables that take long as well, see `long_table`.
    """

    def __init__(
        self, folder: str | Path = "results", quick: bool = False, full: bool = False
    ) -> None:
        self.folder = datasets.REPOSITORY / folder / ("quick" if quick else "full")
        self.quick, self.full = quick, full
        self._tables: list[Path] = []
        self._watch = Watch()

    def table(self, name: str, table: pd.DataFrame) -> pd.DataFrame:
        """Write a result table to ``<folder>/<name>.csv``, and return it to be shown.

        A name has a folder before it where the table belongs apart (``timings/speed``).
        """
        path = self.folder / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.write_table(rounded(table), path)
        self._tables.append(path)
        return table

    def long_table(self, name: str, make: Callable[[bool], pd.DataFrame]) -> pd.DataFrame:
        """Return a result table that takes minutes: the recorded one, unless all is to be made.

        Parameters
        ----------
        name : str
        make : callable
            Computes it, a small one where it is given True. The quick version shows that one; the
            usual version makes it only to see that the code runs, and shows the recorded one.

        Raises
        ------
        AdapterTwinError
            No recorded one is here.
        """
        table = make(not self.full)
        if self.quick or self.full:
            return self.table(name, table)
        steps = read_expected("timings/full")
        from IPython.display import display

        display(  # type: ignore[no-untyped-call]
            Note(
                f"> **Recorded** on {steps['day'].iloc[0]}. `{COMMANDS['full']}` "
                f"({_duration(steps)}) makes this table anew; just now its code ran on a small one."
            )
        )
        return read_expected(name)

    def picture(self, name: str, figure: Figure) -> Figure:
        """Write a figure to ``<folder>/<name>.png``, and return it to be shown."""
        self.folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.folder / f"{name}.png", dpi=110, bbox_inches="tight")
        return figure

    def card(self, seeds: str, **parameters: object) -> Note:
        """Return the chapter's reproduction card, see `study.card.card`."""
        return Note(card(self._watch, {"quick": self.quick} | parameters, seeds, self._tables))

    def notice(self) -> Note | None:
        """Warn a chapter's reader if it is the small version."""
        small = (
            ":::{admonition} Small version\n:class: warning\nFewer runs, shorter simulations "
            "(`QUICK=1`): the numbers of this page are not those of the study.\n:::"
        )
        return Note(small) if self.quick else None


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Keep six digits, so that a recorded table changes only where a result does."""
    floats = {
        name: [float(f"{value:.6g}") for value in table[name]]
        for name in table.columns
        if table[name].dtype.kind == "f"
    }
    return table.assign(**floats)


def read_expected(name: str) -> pd.DataFrame:
    """Read a recorded result table.

    Raises
    ------
    AdapterTwinError
        There is none of that name.
    """
    path = EXPECTED / f"{name}.csv"
    if not path.is_file():
        raise AdapterTwinError(
            f"{name}: no recorded result; `python -m study.results` records those of a run"
        )
    return pd.read_csv(path)


def accuracy_table(left_out: pd.DataFrame, fitted: pd.DataFrame) -> str:
    """Return the twin's errors as a Markdown table, two columns per model.

    Parameters
    ----------
    left_out : DataFrame
        `study.left_out.bars_left_out`: shown as mean and range over the seeds.
    fitted : DataFrame
        `adapter_twin.service.validate.Validation.bars`, of the runs that the laws were fitted to.
    """
    models = [model for model in sorted(fitted["model"].unique()) if model != "all"]
    columns = [f"{model}, {kind}" for model in models for kind in ("left out", "fitted")]
    lines = ["| figure | measure | asked | " + " | ".join(columns) + " | runs |"]
    lines.append("|---|---|---|" + "---|" * (len(columns) + 1))
    keys = ["figure", "measure", "model"]
    unseen = left_out.set_index(keys)[["value", "low", "high"]].T.to_dict("list")
    seen = fitted.set_index(keys)[["value", "n_runs"]].T.to_dict("list")
    for (figure, measure), part in fitted.groupby(["figure", "measure"], sort=False):
        known = [model if model in set(part["model"]) else "all" for model in models]
        cells = []
        for key in [(figure, measure, model) for model in known]:
            value, low, high = unseen.get(key, (None, None, None))
            cells.append("–" if value is None else f"**{value:.3g}** ({low:.3g}–{high:.3g})")
            cells.append(f"{seen[key][0]:.3g}")
        asked = ("at least" if measure in AT_LEAST else "at most") + f" {part['bar'].iloc[0]:g}"
        runs = " / ".join(f"{seen[figure, measure, model][1]:g}" for model in dict.fromkeys(known))
        shown = [_in_words(str(figure)), MEASURES[str(measure)], asked, *cells, runs]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _in_words(figure: str) -> str:
    """Return the name of a figure for people: ``mean_itl_ms`` as mean ITL."""
    words = figure.removesuffix("_ms").replace("_", " ").split(" ")
    return " ".join(word.upper() if word in ("itl", "ttft", "kv") else word for word in words)


def conformance_markdown(table: pd.DataFrame) -> str:
    """Return `study.conformance.conformance_table` as a Markdown table."""
    lines = ["| scheduler | random cases | steps | preemptions | steps that differ |"]
    lines.append("|---|---|---|---|---|")
    for row in table.to_dict("records"):
        counts = (f"{row[name]:,}" for name in ("cases", "steps", "preemptions", "differ"))
        lines.append(f"| {row['scheduler']} | {' | '.join(counts)} |")
    return "\n".join(lines)


def times_markdown() -> str:
    """Return how long the sizes of the study took, where that is recorded, as a Markdown table."""
    rows = [
        f"| `{command}` | {_duration(read_expected(f'timings/{size}'))} |"
        for size, command in COMMANDS.items()
        if (EXPECTED / f"timings/{size}.csv").is_file()
    ]
    return "\n".join(["| command | time |", "|---|---|", *rows])


def _duration(steps: pd.DataFrame) -> str:
    """Return the time of recorded steps, for people."""
    return f"{steps['seconds'].sum() / 60:.0f} min on {steps['cores'].iloc[0]} cores"


def update_readme(text: str) -> str:
    """Return the README's text with its tables renewed from the recorded results."""
    conformance, left_out, bars = map(read_expected, ("conformance", "bars_left_out", "bars"))
    accuracy = (
        "The scheduler, step by step, beside what vLLM's own decided (`data/conformance/`):\n\n"
        f"{conformance_markdown(conformance)}\n\nThe service, beside measured one-hour runs:\n\n"
        f"{accuracy_table(left_out, bars)}"
    )
    for name, tables in (("times", times_markdown()), ("accuracy", accuracy)):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{tables}\n{end}{rest.split(end)[1]}"
    return text


def record(folder: Path) -> list[Path]:
    """Take over the results of a full run: recorded tables, times, pictures, the README's tables.

    Raises
    ------
    AdapterTwinError
        The folder does not hold the results of a full run.
    """
    if not (folder / "bars.csv").is_file():
        raise AdapterTwinError(f"{folder}: holds no results; run `make reproduce`")
    written = []
    for source, pattern, target in (
        (folder, "*.csv", EXPECTED),
        (folder, "*.png", IMAGES),
        (folder.parent / "timings", "*.csv", EXPECTED / "timings"),
    ):
        for path in sorted(source.rglob(pattern)):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            written.append(Path(shutil.copy(path, place)))
    README.write_text(update_readme(README.read_text()))
    return [*written, README]


if __name__ == "__main__":
    for path in record(Results().folder):
        print(path.relative_to(datasets.REPOSITORY))
