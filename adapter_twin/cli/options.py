"""What several verbs take: arguments, options, and an example of their use."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer
from typer.core import TyperCommand


def _check_jobs(jobs: int) -> int:
    from adapter_twin.parallel import check_jobs

    return check_jobs(jobs)


RUNS = Annotated[Path, Argument(metavar="RUNS", help="Table of runs, .parquet or .csv.")]
CALIBRATION = Annotated[
    str,
    Option(
        metavar="NAME|auto[@GPU]",
        help="Calibration: a name, a .json file, auto, or auto@l40s: that of a GPU, or a prior.",
    ),
]
SEED = Annotated[int, Option(min=0, help="Same seed, same result.")]
JOBS = Annotated[int, Option(callback=_check_jobs, help="Processes; -1 is one per core.")]
JSON = Annotated[bool, Option("--json", help="Print JSON.")]
WORKLOAD = Annotated[Path, Argument(metavar="WORKLOAD.yaml", help="Adapters, traffic and SLO.")]
MARGIN = Annotated[
    float | None, Option(help="Safety margin on the served share of the load, as 0.02.")
]
RESUMED = Annotated[
    Path, Option(metavar="DIR", help="Folder for the tables; run again to go on in it.")
]


class Verb(TyperCommand):
    """A command whose help tells the keys of the file that it reads."""

    def get_help(self, ctx: Any) -> str:
        """Return the help; what the file's class imports is not loaded before."""
        from adapter_twin.cli.keys import READS, keys_of, outline

        if self.name in READS:
            keys = f"Keys of the YAML file, those with * needed: {outline(keys_of(self.name))}"
            self.epilog = f"{self.epilog}\n\n{keys}"
        return super().get_help(ctx)


class Verbs(Typer):
    """Commands whose help ends with an example of their use."""

    def example(self, line: str, **options: Any) -> Callable[..., Any]:
        """Return the decorator of a command."""
        return self.command(cls=Verb, epilog=f"Example: adapter-twin {line}", **options)
