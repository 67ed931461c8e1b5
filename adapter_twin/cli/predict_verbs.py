"""Verbs that predict runs: predict, validate, simulate; and traffic, what a log holds."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from adapter_twin.cli import report
from adapter_twin.cli.options import CALIBRATION, JOBS, JSON, RUNS, SEED, Verbs
from adapter_twin.errors import require
from adapter_twin.tables import datasets

verbs = Verbs()


@verbs.example("predict runs.parquet --calibration auto --out predictions.parquet")
def predict(
    runs: RUNS,
    out: Annotated[Path, Option(metavar="PRED.parquet|.csv", help="Where predictions go.")],
    calibration: CALIBRATION = "auto",
    seed: SEED = 0,
    jobs: JOBS = -1,
    observer: Annotated[
        Literal["none", "recorded"],
        Option(help="The measurement's own effect: left out, or as recorded."),
    ] = "recorded",
    intervals: Annotated[
        bool, Option("--intervals", help="Also the ends of 90 % intervals (several simulations).")
    ] = False,
) -> None:
    """Predict a table of runs from its configuration columns alone."""
    from adapter_twin.service.predict import predict

    report.check_target(out, ".parquet", ".csv")
    is_table = runs.suffix != ".json"
    require(is_table, f"{runs}: give a table of runs; benchmarks are for `validate --config`")
    predictions = predict(
        datasets.read_runs(runs),
        calibration,
        seed=seed,
        jobs=jobs,
        observer=observer == "recorded",
        intervals=intervals,
    )
    datasets.write_table(predictions, out)
    feasible = predictions["feasible_start"]
    starved = int((predictions["starved"] & feasible).sum())
    print(
        f"{out}: {len(predictions)} runs, {starved} starved, {int((~feasible).sum())} refused to "
        f"start, {predictions['wall_s'].sum():.1f} s of computing"
    )


@verbs.example(
    "validate runs.parquet --calibration auto --out validation; validate bench.json --config "
    "server.yaml, with what vllm bench serve --save-result wrote"
)
def validate(
    runs: RUNS,
    config: Annotated[
        Path | None,
        Option(metavar="CONFIG.yaml", help="The server of a benchmark, where RUNS is its .json."),
    ] = None,
    calibration: CALIBRATION = "auto",
    out: Annotated[
        Path | None, Option(metavar="DIR", help="Folder for the predictions and the error tables.")
    ] = None,
    seed: SEED = 0,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Predict measured runs, and compare."""
    from adapter_twin.service.predict import predict, predict_starts
    from adapter_twin.service.validate import summary, validate_runs, write_validation

    report.check_target(out)
    if runs.suffix == ".json":
        require(
            config is not None,
            f"{runs}: a benchmark's result tells no slots, adapters or ranks; tell the server's "
            "engine and workload.adapters by --config CONFIG.yaml",
        )
        assert config is not None
        _validate_benchmark(runs, config, calibration, seed, out, as_json=as_json)
        return
    require(config is None, "config: a table of runs tells its engines; leave it out")
    measured = datasets.read_measured_runs(runs)
    predictions = predict(measured, calibration, seed=seed, jobs=jobs)
    starts = authors = None
    if datasets.find("memory") is not None:
        memory = datasets.load("memory").query("model in @measured.model")
        starts = predict_starts(memory, calibration) if len(memory) else None
    if datasets.find("authors_twin") is not None:
        authors = datasets.load("authors_twin").query("run_id in @measured.run_id")
        authors = authors if len(authors) else None
    result = validate_runs(measured, predictions, starts=starts, authors=authors)
    content = summary(result, predictions)
    if out is not None:
        write_validation(result, predictions, out)
    if as_json:
        report.print_json(content)
        return
    print(", ".join(f"{name.replace('_', ' ')} {n}" for name, n in result.counts.items()))
    report.print_each(result.bars, "model", "Bars")
    is_split = (result.errors["regime"] != "all") & (result.errors["runs"] == "all")
    regimes = result.errors[is_split].pivot_table(
        index=["model", "regime", "figure", "n_runs"], columns="measure", values="value"
    )
    report.print_each(regimes.reset_index(), "model", "Errors by regime, in percent")
    worst = result.worst.groupby(["model", "figure"]).head(1)
    report.print_table(
        worst[["figure", "run_id", "regime", "measured", "predicted", "error"]], "Worst"
    )


def _validate_benchmark(
    path: Path, config: Path, calibration: str, seed: int, out: Path | None, *, as_json: bool
) -> None:
    from adapter_twin.service.benchmark import compare_benchmarks

    compared = compare_benchmarks(path, config, calibration, seed=seed)
    if out is not None:
        out.mkdir(exist_ok=True)
        datasets.write_table(compared, out / "benchmarks.csv")
    if as_json:
        report.print_json({"provenance": compared.attrs, "figures": compared.to_dict("records")})
    else:
        report.print_each(compared, "benchmark", "Benchmark, errors in percent")


@verbs.example("simulate examples/simulate.yaml --trace trace.json")
def simulate(
    config: Annotated[Path, Argument(metavar="CONFIG.yaml", help="What to simulate.")],
    trace: Annotated[
        Path | None, Option(metavar="OUT.json", help="Write a Perfetto trace.")
    ] = None,
    records: Annotated[
        Path | None, Option(metavar="OUT.parquet|.csv", help="Write one row per request.")
    ] = None,
    policy: Annotated[
        str | None,
        Option(
            metavar="'NAME [KEY=VALUE ...]'",
            help="In place of engine.policy: vllm, drain, cost_aware, unified_pool, merge, or your "
            "own as module:Class.",
        ),
    ] = None,
    vllm_args: Annotated[
        str | None,
        Option(
            metavar="'vllm serve ...'", help="A real command line in place of engine: its flags."
        ),
    ] = None,
    draws: Annotated[
        int | None,
        Option(
            min=2,
            max=1000,
            help="Simulate also n times with other requests and laws as likely: which states the "
            "server settles in, and how probable each is.",
        ),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Simulate one configuration and summarise the service it gives."""
    from adapter_twin.cli.answers import show_service
    from adapter_twin.fleet.equal_replicas import simulate_fleet
    from adapter_twin.service.perfetto import write_trace
    from adapter_twin.service.predict import predict_scenario
    from adapter_twin.service.states import draw_states
    from adapter_twin.workload.files import load_scenario
    from adapter_twin.workload.named import parse_named

    report.check_target(trace, ".json")
    report.check_target(records, ".parquet", ".csv")
    scenario = load_scenario(config, vllm_args)
    if policy is not None:
        scenario = replace(scenario, policy=parse_named(policy))
    if draws is not None:
        require(
            scenario.fleet is None, "draws: they are of one engine; leave out --draws, or fleet"
        )
    if scenario.fleet is not None:
        require(trace is None, "trace: a trace shows one engine; leave out --trace, or fleet")
        fleet_run, content = simulate_fleet(scenario)
        frame = fleet_run.records.to_frame().assign(replica=fleet_run.replica)
    else:
        run, content = predict_scenario(scenario)
        frame = run.records.to_frame()
        if trace is not None:
            write_trace(run, trace)
    if records is not None:
        told = ("config_hash", "seed", "version", "calibration", "policy")
        frame.attrs.update({name: content[name] for name in told if name in content})
        datasets.write_table(frame, records)
    if draws is not None:
        content = {**content, "draws": draws, "states": draw_states(scenario, draws)}
    report.tell(content, as_json, show_service, str(config))


@verbs.example("traffic AzureLLMInferenceTrace_conv.csv --out requests.parquet")
def traffic(
    source: Annotated[
        Path,
        Argument(
            metavar="SOURCE",
            help="A log of requests, .csv, .csv.gz, .jsonl or .parquet, or what vllm bench serve "
            "--save-detailed, guidellm or AIPerf saved of each.",
        ),
    ],
    window_s: Annotated[
        float, Option(min=1, help="Length of the busiest stretch that is named, in s.")
    ] = 3600.0,
    out: Annotated[
        Path | None,
        Option(metavar="OUT.parquet|.csv", help="Write the requests in the common form."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Tell what a request log or a public trace holds, and write it in the common form."""
    from adapter_twin.workload.request_log import read_requests

    report.check_target(out, ".parquet", ".csv")
    log = read_requests(source)
    told = log.describe(window_s)
    if out is not None:
        datasets.write_table(log.to_frame(), out)
    report.tell(told, as_json, report.print_mapping, source.name)
