"""Verbs that plan: memory, shrink, init, optimum, recommend, place, sweep, train."""

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Context, Option

from adapter_twin.cli import report
from adapter_twin.cli.options import CALIBRATION, JOBS, JSON, MARGIN, SEED, WORKLOAD, Verbs
from adapter_twin.errors import require
from adapter_twin.tables import datasets

verbs = Verbs()


@verbs.example(
    "memory Qwen/Qwen3-8B --gpu l40s --max-loras 32 --max-model-len 8192. Flags of vllm serve are "
    "taken as they are, those that simulate takes under engine; left out, they are vLLM's own",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def memory(
    context: Context,
    model: Annotated[
        str, Argument(metavar="MODEL", help="A name, or a folder with a config.json.")
    ],
    gpu: Annotated[str, Option(metavar="NAME|GIB", help="A GPU, as l40s, or its memory in GiB.")],
    engine: Annotated[
        str | None, Option(metavar="vllm-X", help="Version of vLLM; left out, the newest.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Tell what fits into a GPU's memory, and whether vLLM starts; any dense model, any GPU."""
    from adapter_twin.cli.answers import show_memory
    from adapter_twin.plan.what_fits import what_fits
    from adapter_twin.workload.serve_command import parse_flags

    extra, flags = parse_flags(context.args)
    require(extra is None, f"{extra}: unexpected argument; leave it out")
    flags.pop("enable_lora", None)
    found = what_fits(model, gpu, flags, version=engine)
    report.tell(found, as_json, show_memory)


@verbs.example("shrink adapters --energy 0.99 --merge-above 0.95 --gpu l40s --out smaller")
def shrink(
    folders: Annotated[
        list[Path] | None,
        Argument(metavar="FOLDERS", help="PEFT LoRA adapters, or folders of some."),
    ] = None,
    tuned: Annotated[
        Path | None,
        Option("--from", metavar="DIR", help="In their place: a full fine-tuned checkpoint."),
    ] = None,
    base: Annotated[
        Path | None, Option(metavar="DIR", help="The checkpoint that --from was made of.")
    ] = None,
    energy: Annotated[
        float | None,
        Option(metavar="SHARE", help="Keep this share of every module's energy, as 0.99."),
    ] = None,
    rank: Annotated[
        int | None, Option(min=1, help="Take this rank, in place of the one that keeps --energy.")
    ] = None,
    merge_above: Annotated[
        float | None, Option(metavar="COSINE", help="Merge adapters that are at least so alike.")
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="DIR", help="Write the smaller adapters there, a new folder.")
    ] = None,
    gpu: Annotated[
        str | None, Option(metavar="NAME|GIB", help="Tell what is gained of this GPU's memory.")
    ] = None,
    model: Annotated[
        str | None, Option(help="Served on --gpu; left out, the adapters' base model.")
    ] = None,
    max_model_len: Annotated[
        int | None, Option(min=1, help="On --gpu; left out, the model's own.")
    ] = None,
    workload: Annotated[
        Path | None,
        Option(metavar="WORKLOAD.yaml", help="Traffic of these adapters: tell the service, too."),
    ] = None,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Tell what adapters keep at a lower rank or merged, write them, and tell what that gains."""
    from adapter_twin.cli.answers import show_extracted, show_shrunk
    from adapter_twin.plan.demand import load_demand
    from adapter_twin.shrink.extract import extract
    from adapter_twin.shrink.shrink import ENERGY
    from adapter_twin.shrink.shrink import shrink as shrink_adapters

    report.check_target(out)
    energy = ENERGY if energy is None else energy
    if tuned is not None or base is not None:
        others = (folders, merge_above, gpu, model, max_model_len, workload)
        require(tuned is not None and base is not None, "--from, --base: give both, or none")
        alone = all(one in (None, []) for one in others)
        require(alone, "--from: makes one adapter; ask shrink for the rest when it is written")
        with report.working("decomposing"):
            answer = extract(Path(str(tuned)), Path(str(base)), energy=energy, rank=rank, out=out)
        report.tell(answer, as_json, show_extracted)
        return
    require(bool(folders), "FOLDERS: missing; name PEFT adapters, or --from and --base")
    demand = None if workload is None else load_demand(workload)
    with report.working("decomposing"):
        answer = shrink_adapters(
            folders or (),
            energy=energy,
            rank=rank,
            merge_above=merge_above,
            out=out,
            gpu=gpu,
            model=model,
            max_model_len=max_model_len,
            demand=demand,
            jobs=jobs,
        )
    report.tell(answer, as_json, show_shrunk)


@verbs.example("init workload.yaml")
def init(
    target: Annotated[Path, Argument(metavar="FILE.yaml", help="Where it goes.")] = Path(
        "workload.yaml"
    ),
    kind: Annotated[
        Literal["recommend", "simulate"],
        Option(help="The verb that it is for; place reads what recommend does."),
    ] = "recommend",
    force: Annotated[bool, Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a file to begin with, in which every key is explained."""
    from adapter_twin.cli.keys import template

    report.check_target(target, ".yaml", ".yml")
    require(force or not target.exists(), f"{target}: is there; name another, or give --force")
    datasets.write_text(target, template(kind, str(target)))
    print(f"{target}: put in your adapters, then run adapter-twin {kind} {target}")


@verbs.example("optimum --model llama-3.1-8b-instruct --rates 0.4-0.1-0.05 --ranks 8-16 --json")
def optimum(
    model: Annotated[str, Option(help="Model with a calibration.")],
    ranks: Annotated[str, Option(metavar="R-R-...", help="Ranks, dealt over the adapters.")],
    rates: Annotated[str | None, Option(metavar="R-R-...", help="Requests/s, dealt alike.")] = None,
    request_log: Annotated[
        Path | None,
        Option(metavar="LOG", help="In place of rates: its busiest adapters are served."),
    ] = None,
    calibration: CALIBRATION = "auto",
    served_grid: Annotated[
        str | None, Option(metavar="N,N,...", help="Served adapters to choose from.")
    ] = None,
    slots_grid: Annotated[
        str | None, Option(metavar="G,G,...", help="Adapter slots to choose from.")
    ] = None,
    slo: Annotated[
        str | None,
        Option(
            metavar="CONFIG.yaml|none",
            help="File with ttft_ms, itl_ms, percentile; left out, 2,000 ms and 100 ms for 99 %.",
        ),
    ] = None,
    margin: MARGIN = None,
    mean_input_tokens: Annotated[
        float | None, Option(help="Mean prompt length; left out, the reference study's.")
    ] = None,
    mean_output_tokens: Annotated[
        float | None, Option(help="Mean output length, likewise.")
    ] = None,
    seed: SEED = 0,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Find how many adapters a GPU can serve, with how many slots, at the highest throughput."""
    from adapter_twin.cli.answers import show_optimum
    from adapter_twin.plan import criterion
    from adapter_twin.plan.grid import GRID
    from adapter_twin.plan.optimum import optimum, optimum_of_log
    from adapter_twin.workload.files import load_slo, parse_grid, parse_rates

    require((rates is None) != (request_log is None), "rates: give either them or a request_log")
    limits = None if slo == "none" else load_slo(slo) if slo else criterion.DEFAULT_SLO
    grids = {
        "served_grid": GRID if served_grid is None else parse_grid("served_grid", served_grid),
        "slots_grid": GRID if slots_grid is None else parse_grid("slots_grid", slots_grid),
    }
    margin = criterion.MARGIN if margin is None else margin
    rule = criterion.Criterion(margin=margin, slo=limits)
    about: dict[str, Any] = {"criterion": rule, "seed": seed, "jobs": jobs, **grids}
    if request_log is not None:
        means = {"mean_input_tokens": mean_input_tokens, "mean_output_tokens": mean_output_tokens}
        for name, mean in means.items():
            require(mean is None, f"{name}: the request_log tells; leave it out")
        found = optimum_of_log(request_log, model, ranks, calibration, **about)
        report.tell(found, as_json, show_optimum, model, ranks, limits)
        return
    parse_rates(rates, "rates")  # an error names the option, not the workload's key
    workload = {
        "model": model,
        "rates_per_adapter": rates,
        "ranks": ranks,
        "mean_input_tokens": mean_input_tokens,
        "mean_requested_output_tokens": mean_output_tokens,
    }
    found = optimum(workload, calibration, **about)
    report.tell(found, as_json, show_optimum, model, ranks, limits)


@verbs.example("recommend examples/recommend.yaml --json")
def recommend(workload: WORKLOAD, as_json: JSON = False) -> None:
    """Choose slots and flags for a set of adapters, and tell the service to expect."""
    from adapter_twin.cli.answers import show_recommendation
    from adapter_twin.plan.demand import load_demand
    from adapter_twin.plan.recommend import recommend

    demand = load_demand(workload)
    with report.working("simulating"):
        answer = recommend(demand)
    report.tell(answer, as_json, show_recommendation, demand)


@verbs.example("place examples/place.yaml --manifests k8s --picture packing.png")
def place(
    workload: WORKLOAD,
    gpus: Annotated[
        int | None, Option(min=1, help="Use exactly n GPUs, for the shortest waits.")
    ] = None,
    replicate_above: Annotated[
        float, Option(help="Share of a GPU above which an adapter is on several.")
    ] = 1.0,
    margin: MARGIN = None,
    manifests: Annotated[
        Path | None, Option(metavar="DIR", help="Also write Kubernetes manifests there.")
    ] = None,
    picture: Annotated[
        Path | None, Option(metavar="FILE.png", help="Also draw the packing.")
    ] = None,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Place all adapters on as few GPUs as possible, or on a given number, and check them."""
    from adapter_twin.cli.answers import show_placement
    from adapter_twin.fleet.manifests import write_manifests
    from adapter_twin.fleet.place import place as place_adapters
    from adapter_twin.plan import criterion
    from adapter_twin.plan.demand import load_demand

    report.check_target(manifests)
    report.check_target(picture, ".png", ".svg", ".pdf")
    demand = load_demand(workload)
    with report.working("placing"):
        answer, placement = place_adapters(
            demand,
            gpus=gpus,
            replicate_above=replicate_above,
            margin=criterion.MARGIN if margin is None else margin,
            jobs=jobs,
        )
    if manifests is not None:
        write_manifests(manifests, demand, placement)
    if picture is not None:
        from adapter_twin.fleet.picture import packing

        with datasets.replacing(picture) as temporary:
            packing(demand, placement).savefig(temporary, format=picture.suffix[1:], dpi=150)
    report.tell(answer, as_json, show_placement, demand)


@verbs.example("sweep experiments/designs/quick.yaml --out data/external/quick")
def sweep(
    design: Annotated[Path, Argument(metavar="DESIGN.yaml", help="What to predict.")],
    out: Annotated[
        Path, Option(metavar="DIR", help="Folder for the parts; run again to go on in it.")
    ],
    calibration: CALIBRATION = "auto",
    jobs: JOBS = -1,
    scheduler: Annotated[
        str | None,
        Option(metavar="tcp://HOST:PORT", help="Dask scheduler whose workers do the work."),
    ] = None,
    table: Annotated[
        Path | None,
        Option(metavar="TABLE.parquet", help="Also write all of it as one compact table."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Predict the workloads of a design on a grid of configurations."""
    from adapter_twin.learn.sweep import compact, read_sweep, run_sweep

    report.check_target(out)
    report.check_target(table, ".parquet")
    done = run_sweep(design, out, calibration=calibration, jobs=jobs, scheduler=scheduler)
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
    report.tell(content, as_json, report.print_mapping, str(design))


@verbs.example("train data/sweeps/paper.parquet --out models")
def train(
    sweep_table: Annotated[
        Path, Argument(metavar="SWEEP", help="Folder of a sweep, or a compact table.")
    ],
    out: Annotated[Path, Option(metavar="DIR", help="Folder for the models.")],
    margin: MARGIN = None,
    jobs: JOBS = -1,
    as_json: JSON = False,
) -> None:
    """Fit interpretable models to the optima of a sweep."""
    from adapter_twin.learn.surrogates import chosen
    from adapter_twin.learn.sweep import read_sweep
    from adapter_twin.learn.training import train as fit_models
    from adapter_twin.plan import criterion

    report.check_target(out)
    asked = criterion.Criterion(margin=criterion.MARGIN if margin is None else margin)
    with report.working("fitting"):
        comparison, _ = fit_models(read_sweep(sweep_table), out, asked, jobs=jobs)
    best = chosen(comparison)
    if as_json:
        report.print_json({"out": str(out), "chosen": best.to_dict("records")})
    else:
        report.print_each(best, "language_model", f"Chosen by cross-validation, in {out}")
