"""Schemas of the tables that a campaign of `adapter-twin profile` writes.

Columns not named here pass through unchecked.
"""

from pandera.pandas import DataFrameSchema

from adapter_twin.tables.schemas import (
    BOOL,
    LENGTH_DISTRIBUTIONS,
    LOAD,
    OPTIONAL,
    RUNS,
    SLOTS_AND_RANK,
    choice,
    each,
    label,
    number,
    positive,
    table,
    text,
    whole,
)

CAMPAIGN_RUNS = table(
    "runs",
    **RUNS.columns
    | {
        "campaign": text(),
        "status": text(r"ok|(failed|doubtful):.+", "ok or failed:port in use"),
        "held_out": BOOL,
        **each("repeat seed", whole(0)),
        **each("max_num_batched_tokens max_model_len", whole(1)),
        "length_distribution": choice(LENGTH_DISTRIBUTIONS),
        "length_cv": positive(),
        **each("kv_cache_tokens block_size", positive(nullable=True)),
        **each("failed_requests schedule_error_p99_ms", OPTIONAL),
    },
)
"""The runs of a campaign tell, besides, what the twin needs to draw the very same requests."""

REQUESTS = table(
    "requests",
    run_id=label(),
    request=whole(0),
    adapter=whole(-1),
    # as asked, and as the server counted them
    **each("prompt_tokens output_tokens", whole(1)),
    **each("reported_prompt_tokens reported_output_tokens", OPTIONAL),
    scheduled_s=number(0),
    # A request that never got so far, or had not when the window closed, lacks the later times.
    **each("sent_s first_token_s end_s", OPTIONAL),
    error=text(nullable=True),
)

CAMPAIGN_SERIES = table(
    "series",
    run_id=label(),
    t_s=number(dtype="float32"),
    **each(
        "running waiting preempted_total prompt_tokens_total generated_tokens_total",
        number(0, dtype="float32", nullable=True),
    ),
    kv_usage=number(0, 1, dtype="float32", nullable=True),
)

_TABLES = (
    CAMPAIGN_RUNS,
    REQUESTS,
    CAMPAIGN_SERIES,
    table(
        "micro_steps",
        **each("engine_id model", label()),
        **SLOTS_AND_RANK,
        rank=whole(0),  # 0: the batch holds requests of the base model only
        **each("repeat point step", whole(0)),
        batched_tokens=whole(1),
        **each("decodes prompts prefill_tokens context_tokens distinct_adapters", whole(0)),
        **each("running waiting loads", whole(0)),
        step_ms=positive(),
        **each("schedule_ms output_ms", number(0)),
    ),
    table("adapter_loads", **each("engine_id model", label()), **LOAD),
    table(
        "engine_starts",
        engine_id=text(unique=True),
        model=text(),
        **SLOTS_AND_RANK,
        **each("kv_cache_tokens block_size weights_gib startup_s", positive(nullable=True)),
        capture_s=OPTIONAL,
        server_failure=text(nullable=True),
        gpu_memory_utilization=number(0, 1),
        cpu_kv_cache_gib=positive(),
        **each("max_num_batched_tokens max_num_seqs max_model_len", whole(1)),
    ),
)
CAMPAIGN_TABLES: dict[str, DataFrameSchema] = {schema.name: schema for schema in _TABLES}
"""The schemas of a campaign's tables stand here by the stem of the file name."""
