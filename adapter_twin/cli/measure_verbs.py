"""Verbs that measure: calibrate, profile, prove, watch, data, doctor."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from adapter_twin.cli import report
from adapter_twin.cli.options import JOBS, JSON, RESUMED, Verbs
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.tables import datasets

if TYPE_CHECKING:
    from adapter_twin.laws import Calibration

verbs = Verbs()

CHOICE = ["workload", "method", "adapter_slots", "serves", "regret", "low", "high", "mean_ttft_ms"]
"""Columns of a choice that fit on a terminal."""


@verbs.example(
    "calibrate data/agullo2025 --out calibration.json --model llama-3.1-8b-instruct; "
    "calibrate --prior --model mistralai/Mistral-7B-v0.3 --gpu h100-64gb --engine vllm-0.8.5 "
    "--out prior.json, of a model that no one measured"
)
def calibrate(
    out: Annotated[Path, Option(metavar="CAL.json", help="Where the calibration goes.")],
    tables: Annotated[
        Path | None, Argument(metavar="[TABLES]", help="Folder of measured tables.")
    ] = None,
    prior: Annotated[
        bool, Option("--prior", help="Without tables: from the model's files, GPU and engine.")
    ] = False,
    start: Annotated[
        Path | None,
        Option(
            "--from",
            metavar="PRIOR.json",
            help="Keep this prior, and move its step times to the campaign's batches.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(help="Model to calibrate: of several in the tables, or a name or folder."),
    ] = None,
    gpu: Annotated[str | None, Option(help="Device of the measurements.")] = None,
    engine_version: Annotated[
        str | None,
        Option("--engine-version", "--engine", help="vLLM, where the measurements do not tell."),
    ] = None,
    jobs: JOBS = -1,
) -> None:
    """Fit the laws of one model to measured tables, or say what is known without any."""
    report.check_target(out, ".json")
    asked = {"model": model, "gpu": gpu, "engine": engine_version}
    if prior:
        require(tables is None, "TABLES: a prior is made without; leave them or --prior out")
        require(start is None, "from: a prior is updated by tables; give them, or leave it out")
        require(jobs == -1, "jobs: a prior simulates nothing; leave it out")
        made = _prior(asked)
    else:
        require(tables is not None, "TABLES: give the folder of measured tables, or --prior")
        assert tables is not None
        require(
            tables.is_dir(), f"{tables}: no such folder; give the folder of the measured tables"
        )
        made = (
            _fitted(tables, asked, jobs) if start is None else _updated(start, tables, asked, jobs)
        )
    datasets.write_text(out, made.to_json())
    origin = f", {made.origin}" if prior or start is not None else ""
    print(f"{out}: {made.name}{origin}")


def _prior(asked: Mapping[str, str | None]) -> "Calibration":
    """Return what is known of a model, GPU and engine without any measurement of them."""
    from adapter_twin.laws.prior import prior_calibration
    from adapter_twin.workload.calibration_files import Place, calibration_path

    for key, told in asked.items():
        require(told is not None, f"{key}: a prior needs it; give --{key}")
    name, device, version = (str(told) for told in asked.values())
    place = calibration_path(f"auto@{device}-vllm{version.removeprefix('vllm-')}", name)
    if not isinstance(place, Place):
        raise AdapterTwinError(f"model: it was measured there; use calibration {place.stem}")
    return prior_calibration(name, *place)


def _updated(
    start: Path, tables: Path, asked: Mapping[str, str | None], jobs: int
) -> "Calibration":
    """Return a prior whose step times are moved to those measured."""
    from adapter_twin.calibrate.update import update
    from adapter_twin.laws import Calibration

    for key, told in asked.items():
        require(told is None, f"{key}: the prior tells; leave --{key} out")
    require(jobs == -1, "jobs: an update simulates nothing; leave it out")
    with report.working("updating"):
        return update(Calibration.from_json(start), tables)


def _fitted(tables: Path, asked: Mapping[str, str | None], jobs: int) -> "Calibration":
    """Return laws fitted to measured tables."""
    from adapter_twin.calibrate.from_tables import calibrate_tables

    model, gpu, version = asked.values()
    with report.working("calibrating"):
        return calibrate_tables(tables, model, gpu=gpu, engine_version=version, jobs=jobs)


@verbs.example("profile experiments/campaigns/smoke.yaml --out smoke")
def profile(
    campaign: Annotated[
        Path, Argument(metavar="CAMPAIGN.yaml", help="What to measure, and in what time.")
    ],
    out: RESUMED,
    as_json: JSON = False,
) -> None:
    """Measure a real vLLM on this machine."""
    from adapter_twin.measure.run_campaign import run_campaign

    report.check_target(out)
    summary = run_campaign(campaign, out)
    if as_json:
        report.print_json({"out": str(out), **asdict(summary)})
        return
    for piece, reason in summary.failed.items():
        print(f"{piece} failed: {reason}")
    for piece, reason in summary.doubtful.items():
        print(f"{piece} doubtful: {reason}")
    if summary.stopped is not None:
        print(summary.stopped)
    rows = ", ".join(f"{name} {count}" for name, count in summary.rows.items())
    print(f"{out}: {summary.complete} of {summary.pieces} pieces; rows: {rows or 'none'}")


@verbs.example("prove experiments/studies/smoke.yaml --engine cpu --out proof")
def prove(
    workload: Annotated[
        Path, Argument(metavar="WORKLOAD.yaml", help="A workload, or a study of several.")
    ],
    engine: Annotated[Literal["cpu", "cuda"], Option(help="The build of vLLM on this machine.")],
    out: RESUMED,
    as_json: JSON = False,
) -> None:
    """Run what is recommended, and its rivals, on a real vLLM, and tell how each did."""
    from adapter_twin.prove import comparison
    from adapter_twin.prove.outcome import read_outcome, service
    from adapter_twin.prove.rivals import PLAN
    from adapter_twin.prove.run_study import run_study

    report.check_target(out)
    summary = run_study(workload, engine, out)
    if "runs" not in summary.rows or not (out / PLAN).is_file():
        report.print_text(summary.stopped or "nothing is measured yet")
        return
    measured = read_outcome(out)
    runs = service(measured)
    chosen = comparison.choices(runs, measured.picks)
    methods = comparison.methods(chosen, len(measured.demands))
    verdicts = comparison.verdicts(runs, measured.picks)
    if as_json:
        tables = {"methods": methods, "choices": chosen, "verdicts": verdicts, "runs": runs}
        content = {name: table.to_dict("records") for name, table in tables.items()}
        report.print_json({"out": str(out), **asdict(summary), **content})
        return
    report.print_each(chosen[CHOICE], "workload", "Choices, as measured")
    report.print_table(methods, "Methods, over all workloads")
    report.print_text(
        f"verdicts: {int(verdicts.right.sum())} of {len(verdicts)} runs bear out what was said; "
        "regret is throughput lost against the best configuration run, in percent (95 %)"
    )
    if summary.stopped is not None:
        report.print_text(summary.stopped)
    print(f"{out}: {summary.complete} of {summary.pieces} runs")


@verbs.example("watch http://localhost:8000 CONFIG.yaml")
def watch(
    source: Annotated[
        str, Argument(metavar="URL|METRICS.prom", help="A vLLM server, or its saved /metrics.")
    ],
    config: Annotated[Path, Argument(metavar="CONFIG.yaml", help="What `simulate` takes.")],
    every: Annotated[
        float | None, Option(min=1, help="Time between the two reads of a URL in s; else 10.")
    ] = None,
    span_s: Annotated[
        float | None,
        Option(help="Time from the server's start to a saved page; else to the file's own time."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Show a running server's metrics beside what the twin expects of the same load."""
    import pandas as pd

    from adapter_twin.prove.watch import watch
    from adapter_twin.workload.files import load_scenario

    scenario = load_scenario(config)
    with report.working("watching"):
        seen = watch(source, scenario, every_s=every, span_s=span_s)
    if as_json:
        report.print_json(seen)
        return
    verdicts = {True: "yes", False: "NO", None: ""}
    table = pd.DataFrame(seen["figures"]).replace({"agrees": verdicts})
    report.print_table(table, f"{source}, {seen['span_s']:.0f} s, and the twin at its load")
    report.print_text(
        f"{seen['finished_requests']} requests finished; rates of {config} were multiplied by "
        f"{seen['load_factor']:.3g} and its mean lengths replaced; percentiles of the server are "
        "interpolated in buckets, whose edges are its low and high"
    )
    print(seen["conclusion"])


@verbs.example("data --import ~/GPULLMAdapterOptimization")
def data(
    repository: Annotated[
        Path | None,
        Option(
            "--import", metavar="REPO_FOLDER", help="Import a clone of the authors' repository."
        ),
    ] = None,
    fetch: Annotated[
        bool, Option("--fetch", help="Fetch that repository with git, then import it.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """List the measured data, or import it."""
    from adapter_twin.tables.importer import import_repository

    if repository is not None or fetch:
        require(repository is None or not fetch, "fetch: give --import FOLDER or --fetch, not both")
        require(
            repository is None or repository.is_dir(),
            f"import: {repository} is no folder; give a clone of the repository",
        )
        with report.working("importing the repository"):
            import_repository(repository)
    tables = datasets.inventory()
    if as_json:
        report.print_json(
            {"roots": list(map(str, datasets.roots())), "tables": tables.to_dict("records")}
        )
        return
    places = tables["file"].map(lambda file: str(Path(file).parents[1]) if file else "")
    sizes = tables.pop("size_bytes").map(lambda size: f"{size / 1e3:,.0f} kB" if size else "")
    shown = tables.drop(columns="file").assign(size=sizes, found_in=places)
    report.print_table(shown, f"Measured data: {datasets.DATASET}")
    if (tables["checksum"] == "absent").any():
        print("absent tables are looked for in:", *datasets.roots(), sep="\n  ")
        report.print_text(
            "point ADAPTER_TWIN_DATA to data/ in a clone of this repository; runs and series come "
            "from the authors' repository as well (`adapter-twin data --fetch`)"
        )
    if repository is not None or fetch:
        report.print_text(f"ADAPTER_TWIN_DATA={datasets.EXTERNAL} reads the imported tables first")


@verbs.example("doctor --json")
def doctor(as_json: JSON = False) -> None:
    """Check the installation and say what is missing."""
    from adapter_twin.cli.doctor import examine, works

    checks = examine()
    ok = works(checks)
    if as_json:
        report.print_json({"works": ok, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            mark = "ok" if check.found else "MISSING" if check.needed else "absent"
            print(f"{mark:8} {check.name}: {check.detail}")
        print("the core works" if ok else "the core does not work; install what is MISSING")
    raise typer.Exit(0 if ok else 1)
