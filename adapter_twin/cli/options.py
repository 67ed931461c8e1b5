"""Arguments and options that several verbs take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUNS = Annotated[Path, typer.Argument(metavar="RUNS", help="Table of runs, .parquet or .csv.")]
CALIBRATION = Annotated[
    str, typer.Option(metavar="NAME|auto", help="Calibration: a name, a .json file, or auto.")
]
SEED = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]
JOBS = Annotated[int, typer.Option(help="Processes; -1 is one per core.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
