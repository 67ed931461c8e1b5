"""The command line. Each verb imports what it needs, so that ``--help`` stays quick."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError
from adapter_twin.report import (
    check_target,
    print_json,
    print_mapping,
    print_table,
    progress,
    working,
)
from adapter_twin.strict import require

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A digital twin of a GPU that serves many LoRA adapters with vLLM.",
)

# typer's own copy of click has no public name.
USAGE_ERROR: Any = typer.BadParameter.mro()[2]

RUNS = Annotated[Path, typer.Argument(metavar="RUNS", help="Table of runs, .parquet or .csv.")]
CALIBRATION = Annotated[
    str, typer.Option(metavar="NAME|auto", help="Calibration: a name, a .json file, or auto.")
]
SEED = Annotated[int, typer.Option(min=0, help="Same seed, same result.")]
JOBS = Annotated[int, typer.Option(help="Processes; -1 is one per core.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Observer(StrEnum):
    """Whether to include what the reference measurement did to itself."""

    none = "none"
    recorded = "recorded"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; bad input is one line on stderr and status 2."""
    warnings.showwarning = _show_warning
    # Asked to end, a command ends as by Ctrl-C: worker processes and servers are taken along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command: Any = typer.main.get_command(app)
    try:
        status = command(args=arguments, prog_name="adapter-twin", standalone_mode=False)
        if status == 130:  # typer's answer to Ctrl-C, without a word
            raise KeyboardInterrupt
    except AdapterTwinError as error:
        status = _fail(str(error), 2)
    except USAGE_ERROR as error:
        # Without arguments the message is the help text, which typer has printed.
        status = _fail(error.format_message(), 2) if error.format_message() else 2
    except (KeyboardInterrupt, typer.Abort):
        status = _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print("warning:", " ".join(str(message).split()), file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


@app.command(
    epilog="Example: adapter-twin predict runs.parquet --calibration auto --out predictions.parquet"
)
def predict(
    runs: RUNS,
    out: Annotated[Path, typer.Option(metavar="PRED.parquet", help="Where predictions go.")],
    calibration: CALIBRATION = "auto",
    seed: SEED = 0,
    jobs: JOBS = -1,
    observer: Annotated[
        Observer, typer.Option(help="The measurement's own effect: left out, or as recorded.")
    ] = Observer.recorded,
) -> None:
    """Predict a table of runs from its configuration columns alone."""
    from adapter_twin import datasets
    from adapter_twin.predict import predict_runs

    check_target(out, ".parquet", ".csv")
    predictions = predict_runs(
        datasets.read_runs(runs),
        calibration,
        seed=seed,
        jobs=jobs,
        observer=observer is Observer.recorded,
        progress=sys.stderr.isatty(),
    )
    datasets.write_table(predictions, out)
    feasible = predictions["feasible_start"]
    starved = int((predictions["starved"] & feasible).sum())
    print(
        f"{out}: {len(predictions)} runs, {starved} starved, {int((~feasible).sum())} refused to "
        f"start, {predictions['wall_s'].sum():.1f} s of computing"
    )


@app.command(
    epilog="Example: adapter-twin validate runs.parquet --calibration auto --out validation"
)
def validate(
    runs: RUNS,
    calibration: CALIBRATION = "auto",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the predictions and the error tables."),
    ] = None,
    seed: SEED = 0,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Predict measured runs, and compare."""
    from adapter_twin import datasets
    from adapter_twin.predict import predict_runs, predict_starts
    from adapter_twin.validate import summary, validate_runs, write_validation

    if out is not None:
        check_target(out)
    measured = datasets.read_measured_runs(runs)
    predictions = predict_runs(
        measured, calibration, seed=seed, jobs=jobs, progress=sys.stderr.isatty()
    )
    starts = authors = None
    if datasets.find("memory") is not None:
        memory = datasets.load("memory")
        memory = memory[memory["model"].isin(measured["model"])]
        starts = predict_starts(memory, calibration) if len(memory) else None
    if datasets.find("authors_twin") is not None:
        authors = datasets.load("authors_twin")
        authors = authors if authors["run_id"].isin(measured["run_id"]).any() else None
    result = validate_runs(measured, predictions, starts=starts, authors=authors)
    content = summary(result, predictions)
    if out is not None:
        write_validation(result, predictions, out)
    if as_json:
        print_json(content)
        return
    print(", ".join(f"{name.replace('_', ' ')} {n}" for name, n in result.counts.items()))
    print_table(result.bars, "Bars")
    is_split = (result.errors["regime"] != "all") & (result.errors["runs"] == "all")
    regimes = result.errors[is_split].pivot_table(
        index=["model", "regime", "figure", "n_runs"], columns="measure", values="value"
    )
    print_table(regimes.reset_index(), "Errors by regime (percent)")
    worst = result.worst.groupby(["model", "figure"]).head(1)
    print_table(worst[["figure", "run_id", "regime", "measured", "predicted", "error"]], "Worst")


@app.command(epilog="Example: adapter-twin simulate config.yaml --trace trace.json --json")
def simulate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to simulate.")],
    trace: Annotated[
        Path | None, typer.Option(metavar="OUT.json", help="Write a Perfetto trace.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(metavar="OUT.parquet", help="Write one row per request.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Simulate one configuration and summarise the service it gives."""
    from adapter_twin import datasets
    from adapter_twin.perfetto import write_trace
    from adapter_twin.predict import predict_scenario
    from adapter_twin.scenario import load_scenario

    if trace is not None:
        check_target(trace, ".json")
    if records is not None:
        check_target(records, ".parquet", ".csv")
    run, content = predict_scenario(load_scenario(config))
    if records is not None:
        frame = run.records.to_frame()
        frame.attrs.update(run.provenance)
        datasets.write_table(frame, records)
    if trace is not None:
        write_trace(run, trace)
    if as_json:
        print_json(content)
    else:
        print_mapping(content, str(config))


@app.command(
    epilog="Example: adapter-twin calibrate data/external/agullo2025 --out calibration.json "
    "--model llama-3.1-8b-instruct"
)
def calibrate(
    tables: Annotated[Path, typer.Argument(metavar="TABLES", help="Folder of measured tables.")],
    out: Annotated[Path, typer.Option(metavar="CAL.json", help="Where the calibration goes.")],
    model: Annotated[
        str | None, typer.Option(help="Model to calibrate, where the tables hold several.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Device of the measurements, for the name.")
    ] = None,
    engine_version: Annotated[
        str | None, typer.Option(help="vLLM of the measurements, where they do not tell.")
    ] = None,
    jobs: JOBS = -1,
) -> None:
    """Fit the laws of one model to measured tables."""
    from adapter_twin import datasets
    from adapter_twin.calibration.from_tables import calibrate_tables

    check_target(out, ".json")
    require(tables.is_dir(), f"{tables}: no such folder; give the folder of the measured tables")
    with working("calibrating"):
        fitted = calibrate_tables(tables, model, gpu=gpu, engine_version=engine_version, jobs=jobs)
    with datasets.replacing(out) as temporary:
        temporary.write_text(fitted.to_json())
    print(f"{out}: {fitted.name}")


@app.command(epilog="Example: adapter-twin profile campaigns/smoke.yaml --out smoke")
def profile(
    campaign: Annotated[
        Path, typer.Argument(metavar="CAMPAIGN.yaml", help="What to measure, and in what time.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the tables; run again to go on in it.")
    ],
    as_json: JSON = False,
) -> None:
    """Measure a real vLLM on this machine."""
    from dataclasses import asdict

    from adapter_twin.profiling.run_campaign import run_campaign

    check_target(out)
    with progress() as tell:
        summary = run_campaign(campaign, out, tell)
    if as_json:
        print_json({"out": str(out), **asdict(summary)})
        return
    for piece, reason in summary.failed.items():
        print(f"{piece} failed: {reason}")
    if summary.stopped is not None:
        print(summary.stopped)
    rows = ", ".join(f"{name} {count}" for name, count in summary.rows.items())
    print(f"{out}: {summary.complete} of {summary.pieces} pieces; rows: {rows or 'none'}")


@app.command(
    epilog="Example: adapter-twin optimum --model llama-3.1-8b-instruct --rates 0.4-0.1-0.05 "
    "--ranks 8-16 --json"
)
def optimum(
    model: Annotated[str, typer.Option(help="Model with a calibration.")],
    rates: Annotated[
        str, typer.Option(metavar="R-R-...", help="Requests/s, dealt over the adapters.")
    ],
    ranks: Annotated[str, typer.Option(metavar="R-R-...", help="Ranks, dealt alike.")],
    calibration: CALIBRATION = "auto",
    served_grid: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Served adapters to choose from.")
    ] = None,
    slots_grid: Annotated[
        str | None, typer.Option(metavar="G,G,...", help="Adapter slots to choose from.")
    ] = None,
    slo: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.yaml", help="File with ttft_ms, itl_ms, percentile."),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Safety margin on the served share of the load.")
    ] = None,
    mean_input_tokens: Annotated[
        float | None, typer.Option(help="Mean prompt length; left out, the reference study's.")
    ] = None,
    mean_output_tokens: Annotated[
        float | None, typer.Option(help="Mean output length, likewise.")
    ] = None,
    seed: SEED = 0,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Find how many adapters a GPU can serve, with how many slots, at the highest throughput."""
    import pandas as pd

    from adapter_twin.planning.choice import MARGIN, Criterion
    from adapter_twin.planning.grid import GRID
    from adapter_twin.planning.optimum import find_optimum
    from adapter_twin.scenario import load_slo, parse_grid

    workload = {
        "model": model,
        "rates_per_adapter": rates,
        "ranks": ranks,
        "mean_input_tokens": mean_input_tokens,
        "mean_requested_output_tokens": mean_output_tokens,
    }
    found = find_optimum(
        workload,
        calibration,
        served_grid=GRID if served_grid is None else parse_grid("served_grid", served_grid),
        slots_grid=GRID if slots_grid is None else parse_grid("slots_grid", slots_grid),
        criterion=Criterion(
            margin=MARGIN if margin is None else margin, slo=None if slo is None else load_slo(slo)
        ),
        seed=seed,
        jobs=jobs,
    )
    if as_json:
        print_json(found)
        return
    alternatives = pd.DataFrame(found.pop("alternatives"))
    print_mapping(found, f"{model}, {rates} requests/s, ranks {ranks}")
    print_table(alternatives, "Alternatives")


@app.command(epilog="Example: adapter-twin recommend examples/recommend.yaml --json")
def recommend(
    workload: Annotated[
        Path, typer.Argument(metavar="WORKLOAD.yaml", help="Adapters, traffic and SLO.")
    ],
    as_json: JSON = False,
) -> None:
    """Choose slots and flags for a set of adapters, and tell the service to expect."""
    import pandas as pd

    from adapter_twin.planning.demand import load_demand
    from adapter_twin.planning.recommend import recommend

    with working("simulating"):
        answer = recommend(load_demand(workload))
    if as_json:
        print_json(answer)
        return
    reason, vllm, sglang = (answer.pop(key) for key in ("reason", "vllm_args", "sglang_args"))
    what_if = pd.DataFrame(answer.pop("what_if"))
    expected = pd.DataFrame(answer.pop("expected")).T.rename_axis("figure").reset_index()
    worst = answer.pop("worst_served")
    print_mapping(answer, str(workload))
    print_table(expected, "Expected service, 95 %")
    if worst is not None:
        print_mapping(worst, "Worst-served adapter")
    print_table(what_if, "What if")
    print(reason)
    print("vllm serve MODEL", *vllm)
    print("python -m sglang.launch_server --model-path MODEL", *sglang)


@app.command(
    epilog="Example: adapter-twin place examples/place.yaml --manifests k8s --picture packing.png"
)
def place(
    workload: Annotated[
        Path, typer.Argument(metavar="WORKLOAD.yaml", help="Adapters, traffic and SLO.")
    ],
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Use so many GPUs, for the shortest waits.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Safety margin on the served share of the load.")
    ] = None,
    manifests: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write Kubernetes manifests there.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the packing.")
    ] = None,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Place all adapters on as few GPUs as possible, or on a given number, and check them."""
    import pandas as pd

    from adapter_twin.calibration import load_calibration
    from adapter_twin.fleet.manifests import write_manifests
    from adapter_twin.fleet.place import place as place_adapters
    from adapter_twin.planning.choice import MARGIN
    from adapter_twin.planning.demand import load_demand

    if manifests is not None:
        check_target(manifests)
    if picture is not None:
        check_target(picture, ".png", ".svg", ".pdf")
    demand = load_demand(workload)
    with progress() as tell:
        answer, placement = place_adapters(
            demand,
            gpus=gpus,
            margin=MARGIN if margin is None else margin,
            jobs=jobs,
            tell=tell,
        )
    if manifests is not None:
        laws = load_calibration(demand.calibration, demand.model)
        write_manifests(manifests, demand, placement, laws)
    if picture is not None:
        from adapter_twin.datasets import replacing
        from adapter_twin.fleet_plots import packing

        with replacing(picture) as temporary:
            packing(demand, placement).savefig(temporary, format=picture.suffix[1:], dpi=150)
    if as_json:
        print_json(answer)
        return
    replicas, advice = answer.pop("replicas"), answer.pop("advice")
    print_mapping(answer, str(workload))
    table = pd.DataFrame(replicas).assign(adapters=[len(row["adapters"]) for row in replicas])
    print_table(
        table.drop(columns=["shares", "vllm_args"]).rename_axis("gpu").reset_index(), "GPUs"
    )
    for number, row in enumerate(replicas):
        print(f"GPU {number}: vllm serve MODEL", *row["vllm_args"])
    if advice is not None:
        print(advice)


@app.command(epilog="Example: adapter-twin sweep designs/quick.yaml --out data/external/quick")
def sweep(
    design: Annotated[Path, typer.Argument(metavar="DESIGN.yaml", help="What to predict.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the parts; run again to go on in it.")
    ],
    calibration: CALIBRATION = "auto",
    jobs: JOBS = -1,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="tcp://HOST:PORT", help="Dask scheduler whose workers do the work."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="TABLE.parquet", help="Also write all of it as one compact table."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Predict the workloads of a design on a grid of configurations."""
    from adapter_twin import datasets
    from adapter_twin.planning.sweep import compact, read_sweep, run_sweep

    check_target(out)
    if table is not None:
        check_target(table, ".parquet")
    with progress() as tell:
        done = run_sweep(
            design, out, calibration=calibration, jobs=jobs, scheduler=scheduler, tell=tell
        )
    runs = read_sweep(out)
    if table is not None:
        datasets.write_table(compact(runs), table)
    content = {
        "out": str(out),
        "workloads": int(runs["workload_id"].nunique()),
        "workloads_now": done,
        "runs": len(runs),
        "simulated": int(runs["simulated"].sum()),
    }
    if as_json:
        print_json(content)
    else:
        print_mapping(content, str(design))


@app.command(epilog="Example: adapter-twin train data/sweeps/paper.parquet --out models")
def train(
    sweep_table: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="Folder of a sweep, or a compact table.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the models.")],
    margin: Annotated[
        float | None, typer.Option(help="Safety margin on the served share of the load.")
    ] = None,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Fit interpretable models to the optima of a sweep."""
    from adapter_twin.planning.choice import MARGIN, Criterion
    from adapter_twin.planning.surrogates import chosen
    from adapter_twin.planning.sweep import read_sweep
    from adapter_twin.planning.training import train as fit_models

    check_target(out)
    criterion = Criterion(margin=MARGIN if margin is None else margin)
    with progress() as tell:
        comparison, _ = fit_models(read_sweep(sweep_table), out, criterion, jobs=jobs, tell=tell)
    best = chosen(comparison)
    if as_json:
        print_json({"out": str(out), "chosen": best.to_dict("records")})
    else:
        print_table(best, f"Chosen by cross-validation, in {out}")


@app.command(epilog="Example: adapter-twin data --import ~/GPULLMAdapterOptimization")
def data(
    repository: Annotated[
        Path | None,
        typer.Option(
            "--import", metavar="REPO_FOLDER", help="Import a clone of the authors' repository."
        ),
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch that repository with git, then import it.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """List the measured data, or import it."""
    from adapter_twin import datasets
    from adapter_twin.importer import import_repository

    if repository is not None or fetch:
        require(repository is None or not fetch, "fetch: give --import FOLDER or --fetch, not both")
        require(
            repository is None or repository.is_dir(),
            f"import: {repository} is no folder; give a clone of the repository",
        )
        with working("importing the repository"):
            import_repository(repository)
    tables = datasets.inventory()
    if as_json:
        print_json({"roots": list(map(str, datasets.roots())), "tables": tables.to_dict("records")})
        return
    places = tables["file"].map(lambda file: str(Path(file).parent) if file else "")
    shown = tables.drop(columns="file").assign(folder=places)
    print_table(shown, f"Measured data: {datasets.DATASET}")
    if (tables["checksum"] == "absent").any():
        print("absent tables are looked for in:", *datasets.roots(), sep="\n  ")
        print(
            "get runs and series with `adapter-twin data --fetch`, or from a clone with "
            "`adapter-twin data --import REPO_FOLDER`; put the others into one of these places"
        )


@app.command(epilog="Example: adapter-twin doctor --json")
def doctor(as_json: JSON = False) -> None:
    """Check the installation and say what is missing."""
    from dataclasses import asdict

    from adapter_twin.doctor import examine, works

    checks = examine()
    ok = works(checks)
    if as_json:
        print_json({"works": ok, "checks": [asdict(check) for check in checks]})
    else:
        marks = {(True, True): "ok", (True, False): "ok", (False, True): "MISSING"}
        for check in checks:
            mark = marks.get((check.found, check.needed), "absent")
            print(f"{mark:8} {check.name}: {check.detail}")
        print("the core works" if ok else "the core does not work; install what is MISSING")
    raise typer.Exit(0 if ok else 1)
