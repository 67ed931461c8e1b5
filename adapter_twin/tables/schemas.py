"""Schemas of the tables that are read or written, and the kinds of columns that they are made of.

The tables of our own campaigns are in `adapter_twin.tables.campaign_schemas`. Columns not named
here pass through unchecked: upstream tables carry more than this project reads. Importing this
module imports pandera (about a second), so the rest of the package imports it late.
"""

import copy
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pandas as pd
from pandera.errors import SchemaErrors
from pandera.pandas import Check, Column, DataFrameSchema

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.tables.run_folder import FAILURE_SIGNS
from adapter_twin.workload.engine_config import LORA_RANKS, ServeFlags

MODELS = ("llama-3.1-8b-instruct", "qwen-2.5-7b-instruct")
"""The H100 campaigns served these models."""

FAILURES = (*FAILURE_SIGNS, "unknown")
"""These are the reasons why a server did not start, most telling first."""

STATUSES = ("ok", "log_truncated_series_ok", *(f"failed:{failure}" for failure in FAILURES))
"""A one-hour run ends in one of these ways."""

MOST_NAMED = 12
"""A message names no more columns than that, and counts the rest."""

_REMEDY = "correct it or remove the row"


def number(low: float | None = None, high: float | None = None, **options: Any) -> Column:
    """Return a finite float between bounds."""
    checks = [Check(lambda x: x.abs() != float("inf"), error="must be finite")]
    if low is not None:
        checks.append(Check.ge(low, error=f"must be at least {low:g}"))
    if high is not None:
        checks.append(Check.le(high, error=f"must be at most {high:g}"))
    return Column(**{"dtype": float, "checks": checks, "coerce": True, **options})


def positive(**options: Any) -> Column:
    """Return a finite float above zero."""
    checks = [Check.gt(0, error="must be above 0"), Check.lt(float("inf"), error="must be finite")]
    return Column(float, checks, coerce=True, **options)


def whole(low: int) -> Column:
    """Return a whole number of at least `low`."""
    return Column("int64", Check.ge(low, error=f"must be at least {low}"), coerce=True)


def text(pattern: str = r".+", example: str = "", **options: Any) -> Column:
    """Return a text that matches a pattern."""
    error = f"must look like {example}" if example else "must not be empty"
    return Column(str, Check.str_matches(rf"^(?:{pattern})$", error=error), coerce=True, **options)


def choice(allowed: Iterable[Any], dtype: Any = str, **options: Any) -> Column:
    """Return one of some values."""
    values = list(allowed)
    error = f"must be one of {', '.join(map(str, values))}"
    return Column(dtype, Check.isin(values, error=error), coerce=True, **options)


def label(*allowed: str) -> Column:
    """Return a category, one of some names or any."""
    # Names repeat over many rows; categories keep the long tables small.
    return choice(allowed, "category") if allowed else Column("category", coerce=True)


def each(names: str, column: Column) -> dict[str, Column]:
    """Return the same column under several names, written as one text."""
    return {name: copy.deepcopy(column) for name in names.split()}


def table(name: str, /, **columns: Column) -> DataFrameSchema:
    """Return the schema of a table of these columns."""
    return DataFrameSchema(columns, name=name)


BOOL = Column(bool)
RANK = choice(LORA_RANKS, "int64")
OPTIONAL = number(0, nullable=True)
THROUGHPUTS = each("input_throughput output_throughput total_throughput", OPTIONAL)
TTFT = each("mean_ttft_ms median_ttft_ms p99_ttft_ms", OPTIONAL)
TPOT = each("mean_tpot_ms median_tpot_ms p99_tpot_ms", OPTIONAL)
ITL = each("mean_itl_ms median_itl_ms p99_itl_ms", OPTIONAL)
SHARE = number(0, 1, nullable=True)
SLOTS_AND_RANK = {"adapter_slots": whole(0), "max_lora_rank": RANK}
SERVED_AND_SLOTS = each("served_adapters adapter_slots", whole(1))
MEAN_TOKENS = "mean_input_tokens mean_requested_output_tokens"
LENGTH_DISTRIBUTIONS = ("sharegpt", "lognormal", "fixed")
LOAD = {
    "rank": whole(1),
    "max_lora_rank": RANK,
    "source": choice(("disk", "memory")),
    "index": whole(0),
    "load_ms": positive(),
}
"""Columns of a measured load of an adapter."""

RUN_CONFIGURATION = table(
    "run configuration",
    run_id=text(unique=True),
    model=text(),
    rates_per_adapter=text(r"\d+(\.\d+)?(-\d+(\.\d+)?)*", "0.1-0.05-0.025"),
    ranks=text(r"\d+(-\d+)*", "8-16"),
    **SERVED_AND_SLOTS,
    max_lora_rank=RANK,
    max_num_seqs=whole(1),
    # A run that never started measured neither its duration nor its lengths.
    duration_s=positive(nullable=True),
    **each(MEAN_TOKENS, number(1, nullable=True)),
    # Other flags of the engine, which checks them itself.
    **each(
        " ".join(field.name for field in fields(ServeFlags) if field.name != "max_num_seqs"),
        Column(None, nullable=True, required=False),
    ),
    # What a campaign of one's own tells besides, so that its very requests can be drawn again.
    length_distribution=choice(LENGTH_DISTRIBUTIONS, required=False),
    length_cv=positive(nullable=True, required=False),
    seed=number(0, nullable=True, required=False),
    # What a sweep varies besides.
    zipf_exponent=number(0, nullable=True, required=False),
    arrival_cv=positive(nullable=True, required=False),
)
"""`predict` reads these columns and no others."""

WITH_INTERVALS = ("total_throughput", "mean_itl_ms", "median_ttft_ms", "p99_itl_ms")

PREDICTIONS = table(
    "predictions",
    run_id=text(unique=True),
    **THROUGHPUTS,
    completed_requests=OPTIONAL,
    **TTFT,
    **ITL,
    mean_tpot_ms=OPTIONAL,
    **each("starved feasible_start", BOOL),
    kv_cache_tokens=OPTIONAL,
    wall_s=number(0),
    **each(
        " ".join(f"{figure}_low {figure}_high" for figure in WITH_INTERVALS),
        number(0, nullable=True, required=False),
    ),
)
"""`predict` writes a row per run, in this order; there are no figures where vLLM does not start."""

SWEEP = table(
    "sweep",
    **each("workload_id model rates_per_adapter ranks", label()),
    **SERVED_AND_SLOTS,
    max_lora_rank=RANK,
    **each(f"{MEAN_TOKENS} duration_s", positive()),
    zipf_exponent=number(0),
    arrival_cv=positive(),
    **each("feasible_start simulated", BOOL),
    offered_tokens_per_s=number(0),
    **each("total_throughput mean_ttft_ms", OPTIONAL),
    slo_attainment=SHARE,
)
"""A sweep has a row per run, with no figures where it was not simulated."""

RUNS = table(
    "runs",
    **RUN_CONFIGURATION.columns,
    campaign=choice(("twin_validation", "optimum_grid")),
    status=choice(STATUSES),
    **each("sent_is_exact client_collapsed", BOOL),
    **each("offered_request_rate sent_requests completed_requests", OPTIONAL),
    **each("input_tokens output_tokens preemptions", OPTIONAL),
    **THROUGHPUTS,
    **TTFT,
    **TPOT,
    **ITL,
    **each("running_mean running_max running_mean_2nd_half", OPTIONAL),
    **each("waiting_mean waiting_max waiting_last", OPTIONAL),
    waiting_slope_2nd_half_per_s=number(nullable=True),
    **each("kv_usage_mean kv_usage_max", SHARE),
    source_path=text(),
)

# What only an import of the raw repository holds is not required of a series.
SERIES = table(
    "series",
    run_id=label(),
    t_s=number(-600, 7200, dtype="float32"),
    **each("stopped_by_eos_total running", number(0, dtype="float32", nullable=True)),
    **each("waiting preempted_total", number(0, dtype="float32", nullable=True, required=False)),
    kv_usage=number(0, 1, dtype="float32", nullable=True, required=False),
    # The upstream logger loses counters past a million.
    **each(
        "prompt_tokens_total generated_tokens_total",
        number(0, 1e6, dtype="float32", nullable=True, required=False),
    ),
)

_MEASURED = (
    RUNS,
    SERIES,
    table(
        "windows",
        run_id=label(),
        model=label(*MODELS),
        t_s=number(0, 3600),
        **each("n_samples adapter_slots served_adapters", whole(1)),
        max_lora_rank=RANK,
        **each("dt_s running gen_tps step_ms kv_cap_tokens", positive()),
        **each("running_sd waiting kv_tokens preempt_per_s", number(0)),
        kv_usage=number(0, 1),
        prompt_tps=OPTIONAL,
        expected_distinct_adapters=number(0),
    ),
    table(
        "steps",
        run_id=label(),
        kind=label("overhead_initial", "overhead"),
        model=label(*MODELS),
        **each("step distinct_adapters adapter_slots served_adapters rank", whole(0)),
        **each("step_ms batched_tokens running", positive()),
        schedule_ms=number(0),
        kv_tokens=number(),  # rebuilt from counters upstream: below zero in a few steps
    ),
    table(
        "base_steps",
        **each("run_id kind", text()),
        model=choice(MODELS),
        **each("running step_ms", positive()),
        kv_tokens=OPTIONAL,
        full=BOOL,
    ),
    table("adapter_loads", run_id=text(), model=choice(MODELS), **LOAD),
    table(
        "memory",
        model=choice(MODELS),
        **SLOTS_AND_RANK,
        **each("kv_cache_tokens model_load_gib", positive(nullable=True)),
        **each("graph_capture_gib graph_capture_s", positive(nullable=True)),
        server_failure=choice(FAILURES, nullable=True),
        gpu_memory_utilization=number(0, 1),
        max_num_batched_tokens=whole(1),
    ),
    table(
        "scheduler_runs",
        **each("gpu_loras cpu_loras rank steps", whole(1)),
        **each("adapter_rates mean_itl_ms duration wall_ms_per_step", positive()),
        **each("output_throughput completed_requests avg_batch_size", number(0)),
        **each("avg_waiting_queue mean_loras_by_batch sched_ms_per_step", number(0)),
        max_lora_loads_from_memory=number(0),
    ),
    table(
        "overhead_runs_vllm050",
        **each("source folder", text()),
        model=choice(("llama-2-7b", "llama-2-13b")),
        **each("slots_max_loras served_max_cpu_loras max_lora_rank", number(1, nullable=True)),
        vllm_version=choice(("0.5.0",)),
        status=text(r"ok|failed:\w+", "ok or failed:oom"),
        total_throughput=OPTIONAL,
        **TTFT,
        **TPOT,
        **ITL,
    ),
    table(
        "authors_twin",
        run_id=text(unique=True),
        mode=choice(("replay", "from_scratch")),
        **each("total_throughput penalised_mean_ttft_ms", number(0)),
        **each("mean_itl_ms wall_s", positive()),
        **each("completed_requests arrivals", OPTIONAL),
    ),
    table(
        "authors_twin_sweep",
        model=label(*MODELS),
        **each("adapter_slots served_adapters", whole(1)),
        **each("rates_per_adapter ranks", label()),
        **each("pool_in pool_out", number(1, dtype="float32")),
        offered_rate_req_s=positive(),
        total_throughput=number(0),
    ),
    table(
        "sharegpt_lengths",
        kind=choice(("prompt", "output")),
        bin_left_tokens=number(0),
        bin_right_tokens=positive(),
        count=number(0),
    ),
)
TABLES: dict[str, DataFrameSchema] = {schema.name: schema for schema in _MEASURED}
"""The schemas of the measured tables stand here by the stem of the file name."""


def validate(frame: pd.DataFrame, schema: DataFrameSchema, source: object) -> pd.DataFrame:
    """Return `frame` with the schema's types, or say in one line what is wrong with it.

    Parameters
    ----------
    frame : pandas.DataFrame
    schema : pandera.pandas.DataFrameSchema
        One of this module's.
    source : object
        Where the table came from (a path, a table's name), for the message.

    Returns
    -------
    pandas.DataFrame
        Columns in their order, those of the schema coerced to its types.

    Raises
    ------
    AdapterTwinError
        No rows, a missing column, a value of the wrong type or out of range.
    """
    columns = {n: c for n, c in schema.columns.items() if c.required or n in frame}
    missing = [name for name in columns if name not in frame]
    if missing:
        needed = [name for name, column in schema.columns.items() if column.required]
        raise AdapterTwinError(
            f"{source}: column{'s' if len(missing) > 1 else ''} {_some(missing)} missing; "
            f"{schema.name} needs {_some(needed)}"
        )
    require(not frame.empty, f"{source}: the table has no rows; give at least one")
    for name, column in columns.items():
        if str(column.dtype) == "int64":
            # A plain coercion would cut 1.5 to 1.
            whole = pd.to_numeric(frame[name], errors="coerce") % 1 == 0
            _reject(~whole, frame[name], source, "must be a whole number")
    try:
        checked = schema.validate(frame, lazy=True)
    except SchemaErrors as error:
        raise AdapterTwinError(f"{source}: {_first_failure(frame, error)}; {_REMEDY}") from None
    if set(RUN_CONFIGURATION.columns) <= set(schema.columns):
        slots, ranks = checked["adapter_slots"], checked["ranks"]
        _reject(
            slots > checked["served_adapters"], slots, source, "must not exceed served_adapters"
        )
        highest = ranks.map(lambda mix: max(map(int, mix.split("-"))))
        _reject(highest > checked["max_lora_rank"], ranks, source, "a rank exceeds max_lora_rank")
    return checked


def _some(names: list[str]) -> str:
    """Name as many columns as a reader takes in."""
    left = len(names) - MOST_NAMED
    return ", ".join([*names[:MOST_NAMED], f"{left} more"] if left > 1 else names)


def _reject(bad: "pd.Series[bool]", values: "pd.Series[Any]", source: object, reason: str) -> None:
    if bad.any():
        row, value = bad[bad].index[0], values[bad].iloc[0]
        raise AdapterTwinError(
            f"{source}: {values.name} in row {row} is {value}: {reason}; {_REMEDY}"
        )


def _first_failure(frame: pd.DataFrame, error: SchemaErrors) -> str:
    """Describe the first failure as ``COLUMN in row N is VALUE: what it must be``."""
    first = error.failure_cases.iloc[0]
    column, row, check = str(first["column"]), first["index"], str(first["check"])
    dtype = error.schema.columns[column].dtype
    if pd.isna(row):
        return f"{column} holds {first['failure_case']} values, expected {dtype}"
    if check.startswith("coerce_dtype"):
        check = f"must be of type {dtype}"
    reasons = {"not_nullable": "must not be empty", "field_uniqueness": "must be unique"}
    return f"{column} in row {row} is {frame[column][row]}: {reasons.get(check, check)}"
