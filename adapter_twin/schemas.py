"""Schemas of every table that is read or written, in one place.

Columns not named here pass through unchecked: upstream tables carry more than this project reads.
Importing this module imports pandera (about a second), so the rest of the package imports it late.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pandas as pd
from pandera.errors import SchemaErrors
from pandera.pandas import Check, Column, DataFrameSchema

from adapter_twin.config import LORA_RANKS
from adapter_twin.errors import AdapterTwinError

MODELS = ("llama-3.1-8b-instruct", "qwen-2.5-7b-instruct")
"""Models of the H100 campaigns."""

FAILURES = (
    "kv_lt_max_seq_len",
    "no_mem_cache_blocks",
    "oom",
    "illegal_mem_access",
    "port_in_use",
    "unknown",
)
"""Why a server did not start, most telling first."""

STATUSES = ("ok", "log_truncated_series_ok", *(f"failed:{failure}" for failure in FAILURES))
"""What became of a one-hour run."""


def _number(low: float | None = None, high: float | None = None, **options: Any) -> Column:
    checks = [Check(lambda x: x.abs() != float("inf"), error="must be finite")]
    if low is not None:
        checks.append(Check.ge(low, error=f"must be at least {low:g}"))
    if high is not None:
        checks.append(Check.le(high, error=f"must be at most {high:g}"))
    return Column(**{"dtype": float, "checks": checks, "coerce": True, **options})


def _positive(**options: Any) -> Column:
    checks = [Check.gt(0, error="must be above 0"), Check.lt(float("inf"), error="must be finite")]
    return Column(float, checks, coerce=True, **options)


def _whole(low: int) -> Column:
    return Column("int64", Check.ge(low, error=f"must be at least {low}"), coerce=True)


def _text(pattern: str = r".+", example: str = "", **options: Any) -> Column:
    error = f"must look like {example}" if example else "must not be empty"
    return Column(str, Check.str_matches(rf"^(?:{pattern})$", error=error), coerce=True, **options)


def _choice(allowed: Iterable[Any], dtype: Any = str, **options: Any) -> Column:
    values = list(allowed)
    error = f"must be one of {', '.join(map(str, values))}"
    return Column(dtype, Check.isin(values, error=error), coerce=True, **options)


def _label(*allowed: str) -> Column:
    # Names repeat over many rows; categories keep the long tables small.
    return _choice(allowed, "category") if allowed else Column("category", coerce=True)


def _each(names: str, column: Column) -> dict[str, Column]:
    return {name: copy.deepcopy(column) for name in names.split()}


_BOOL = Column(bool)
_RANK = _choice(LORA_RANKS, "int64")
_OPTIONAL = _number(0, nullable=True)
_THROUGHPUTS = _each("input_throughput output_throughput total_throughput", _OPTIONAL)
_TTFT = _each("mean_ttft_ms median_ttft_ms p99_ttft_ms", _OPTIONAL)
_TPOT = _each("mean_tpot_ms median_tpot_ms p99_tpot_ms", _OPTIONAL)
_ITL = _each("mean_itl_ms median_itl_ms p99_itl_ms", _OPTIONAL)

RUN_CONFIGURATION = DataFrameSchema(
    {
        "run_id": _text(unique=True),
        "model": _text(),
        "rates_per_adapter": _text(r"\d+(\.\d+)?(-\d+(\.\d+)?)*", "0.1-0.05-0.025"),
        "ranks": _text(r"\d+(-\d+)*", "8-16"),
        **_each("served_adapters adapter_slots", _whole(1)),
        "max_lora_rank": _RANK,
        "max_num_seqs": _whole(1),
        # A run that never started measured neither its duration nor its lengths.
        "duration_s": _positive(nullable=True),
        **_each("mean_input_tokens mean_requested_output_tokens", _number(1, nullable=True)),
    },
    name="run configuration",
)
"""What `predict` reads, and nothing else."""

PREDICTIONS = DataFrameSchema(
    {
        "run_id": _text(unique=True),
        **_THROUGHPUTS,
        "completed_requests": _OPTIONAL,
        **_TTFT,
        **_ITL,
        "mean_tpot_ms": _OPTIONAL,
        **_each("starved feasible_start", _BOOL),
        "kv_cache_tokens": _OPTIONAL,
        "wall_s": _number(0),
    },
    name="predictions",
)
"""What `predict` writes, in this order: one row per run, no figures where the start is refused."""

RUNS = DataFrameSchema(
    {
        **RUN_CONFIGURATION.columns,
        "campaign": _choice(("twin_validation", "optimum_grid")),
        "status": _choice(STATUSES),
        **_each("sent_is_exact client_collapsed", _BOOL),
        **_each("offered_request_rate sent_requests completed_requests", _OPTIONAL),
        **_each("input_tokens output_tokens preemptions", _OPTIONAL),
        **_THROUGHPUTS,
        **_TTFT,
        **_TPOT,
        **_ITL,
        **_each("running_mean running_max running_mean_2nd_half", _OPTIONAL),
        **_each("waiting_mean waiting_max waiting_last", _OPTIONAL),
        "waiting_slope_2nd_half_per_s": _number(nullable=True),
        **_each("kv_usage_mean kv_usage_max", _number(0, 1, nullable=True)),
        "source_path": _text(),
    },
    name="runs",
)

SERIES = DataFrameSchema(
    {
        "run_id": _label(),
        "t_s": _number(-600, 7200, dtype="float32"),
        **_each(
            "running waiting preempted_total stopped_by_eos_total",
            _number(0, dtype="float32", nullable=True),
        ),
        "kv_usage": _number(0, 1, dtype="float32", nullable=True),
        # The upstream logger loses counters past a million.
        **_each(
            "prompt_tokens_total generated_tokens_total",
            _number(0, 1e6, dtype="float32", nullable=True),
        ),
    },
    name="series",
)

WINDOWS = DataFrameSchema(
    {
        "run_id": _label(),
        "model": _label(*MODELS),
        "t_s": _number(0, 3600),
        **_each("n_samples adapter_slots served_adapters", _whole(1)),
        "max_lora_rank": _RANK,
        **_each("dt_s running gen_tps step_ms kv_cap_tokens", _positive()),
        **_each("running_sd waiting kv_tokens preempt_per_s", _number(0)),
        "kv_usage": _number(0, 1),
        "prompt_tps": _OPTIONAL,
        "expected_distinct_adapters": _number(0),
    },
    name="windows",
)

STEPS = DataFrameSchema(
    {
        "run_id": _label(),
        "kind": _label("overhead_initial", "overhead"),
        "model": _label(*MODELS),
        **_each("step distinct_adapters adapter_slots served_adapters rank", _whole(0)),
        **_each("step_ms batched_tokens running", _positive()),
        "schedule_ms": _number(0),
        # Rebuilt from counters upstream: below zero in a few steps.
        "kv_tokens": _number(),
    },
    name="steps",
)

BASE_STEPS = DataFrameSchema(
    {
        **_each("run_id kind", _text()),
        "model": _choice(MODELS),
        **_each("running step_ms", _positive()),
        "kv_tokens": _OPTIONAL,
        "full": _BOOL,
    },
    name="base_steps",
)

PROFILE_RUNS = DataFrameSchema(
    {
        "run_id": _text(unique=True),
        "kind": _text(),
        "model": _choice(MODELS),
        **_each("slots rank completed", _OPTIONAL),
        **_each("duration kv_cache_tokens model_load_gib", _positive(nullable=True)),
        "server_failure": _choice(FAILURES, nullable=True),
        **_TTFT,
        **_TPOT,
        **_ITL,
    },
    name="profile_runs",
)

ADAPTER_LOADS = DataFrameSchema(
    {
        "run_id": _text(),
        "model": _choice(MODELS),
        "rank": _whole(1),
        "max_lora_rank": _RANK,
        "source": _choice(("disk", "memory")),
        "index": _whole(0),
        "load_ms": _positive(),
    },
    name="adapter_loads",
)

MEMORY = DataFrameSchema(
    {
        "model": _choice(MODELS),
        "adapter_slots": _whole(0),
        "max_lora_rank": _RANK,
        **_each(
            "kv_cache_tokens model_load_gib graph_capture_gib graph_capture_s",
            _positive(nullable=True),
        ),
        "server_failure": _choice(FAILURES, nullable=True),
        "gpu_memory_utilization": _number(0, 1),
        "max_num_batched_tokens": _whole(1),
    },
    name="memory",
)

SCHEDULER_RUNS = DataFrameSchema(
    {
        **_each("gpu_loras cpu_loras rank steps", _whole(1)),
        **_each("rate adapter_rates mean_itl_ms duration wall_ms_per_step", _positive()),
        **_each("output_throughput completed_requests avg_batch_size", _number(0)),
        **_each("avg_waiting_queue mean_loras_by_batch sched_ms_per_step", _number(0)),
    },
    name="scheduler_runs",
)

AUTHORS_TWIN = DataFrameSchema(
    {
        "run_id": _text(unique=True),
        "mode": _choice(("replay", "from_scratch")),
        **_each("total_throughput penalised_mean_ttft_ms", _number(0)),
        **_each("mean_itl_ms wall_s", _positive()),
        **_each("completed_requests arrivals", _OPTIONAL),
    },
    name="authors_twin",
)

AUTHORS_TWIN_SWEEP = DataFrameSchema(
    {
        "model": _label(*MODELS),
        **_each("adapter_slots served_adapters", _whole(1)),
        **_each("rates_per_adapter ranks", _label()),
        **_each("total_throughput penalised_mean_ttft_ms", _number(0)),
        "mean_itl_ms": _positive(),
    },
    name="authors_twin_sweep",
)

OVERHEAD_RUNS_VLLM050 = DataFrameSchema(
    {
        **_each("source folder", _text()),
        "model": _choice(("llama-2-7b", "llama-2-13b")),
        **_each("slots_max_loras served_max_cpu_loras max_lora_rank", _number(1, nullable=True)),
        "vllm_version": _choice(("0.5.0",)),
        "status": _text(r"ok|failed:\w+", "ok or failed:oom"),
        "total_throughput": _OPTIONAL,
        **_TTFT,
        **_TPOT,
        **_ITL,
    },
    name="overhead_runs_vllm050",
)

SHAREGPT_LENGTHS = DataFrameSchema(
    {
        "kind": _choice(("prompt", "output")),
        "bin_left_tokens": _number(0),
        "bin_right_tokens": _positive(),
        "count": _number(0),
    },
    name="sharegpt_lengths",
)

TABLES: dict[str, DataFrameSchema] = {
    "runs": RUNS,
    "series": SERIES,
    "windows": WINDOWS,
    "steps": STEPS,
    "base_steps": BASE_STEPS,
    "profile_runs": PROFILE_RUNS,
    "adapter_loads": ADAPTER_LOADS,
    "memory": MEMORY,
    "scheduler_runs": SCHEDULER_RUNS,
    "overhead_runs_vllm050": OVERHEAD_RUNS_VLLM050,
    "authors_twin": AUTHORS_TWIN,
    "authors_twin_sweep": AUTHORS_TWIN_SWEEP,
    "sharegpt_lengths": SHAREGPT_LENGTHS,
}
"""Measured tables by the stem of their file name."""


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
    missing = [name for name in schema.columns if name not in frame]
    if missing:
        raise AdapterTwinError(
            f"{source}: column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing; "
            f"{schema.name} needs {', '.join(schema.columns)}"
        )
    if frame.empty:
        raise AdapterTwinError(f"{source}: the table has no rows; give at least one")
    for name, column in schema.columns.items():
        if str(column.dtype) == "int64":
            # A plain coercion would cut 1.5 to 1.
            whole = pd.to_numeric(frame[name], errors="coerce") % 1 == 0
            _reject(~whole, frame[name], source, "must be a whole number")
    try:
        checked = schema.validate(frame, lazy=True)
    except SchemaErrors as error:
        raise AdapterTwinError(f"{source}: {_first_failure(frame, error)}; {_REMEDY}") from None
    if set(RUN_CONFIGURATION.columns) <= set(schema.columns):
        _check_slots_and_ranks(checked, source)
    return checked


_REMEDY = "correct it or remove the row"


def _check_slots_and_ranks(runs: pd.DataFrame, source: object) -> None:
    slots, ranks = runs["adapter_slots"], runs["ranks"]
    _reject(slots > runs["served_adapters"], slots, source, "must not exceed served_adapters")
    highest = ranks.map(lambda mix: max(map(int, mix.split("-"))))
    _reject(highest > runs["max_lora_rank"], ranks, source, "a rank exceeds max_lora_rank")


def _reject(bad: pd.Series[bool], values: pd.Series[Any], source: object, reason: str) -> None:
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
