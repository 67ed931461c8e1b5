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
WORKLOAD = Annotated[
    Path, typer.Argument(metavar="WORKLOAD.yaml", help="Adapters, traffic and SLO.")
]
MARGIN = Annotated[
    float | None, typer.Option(help="Safety margin on the served share of the load.")
]
RESUMED = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder for the tables; run again to go on in it.")
]
