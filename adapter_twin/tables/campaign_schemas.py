"""Schemas of the tables that a campaign of `adapter-twin profile` writes.

Columns not named here pass through unchecked.
"""

from __future__ import annotations

from pandera.pandas import DataFrameSchema

from adapter_twin.tables.columns import (
    BOOL,
    OPTIONAL,
    RANK,
    choice,
    each,
    label,
    number,
    positive,
    text,
    whole,
)
from adapter_twin.tables.schemas import RUNS

CAMPAIGN_RUNS = DataFrameSchema(
    {
        **RUNS.columns,
        "campaign": text(),
        "status": text(r"ok|failed:.+", "ok or failed:port in use"),
        "held_out": BOOL,
        **each("repeat seed", whole(0)),
        "max_num_batched_tokens": whole(1),
        "max_model_len": whole(1),
        "length_distribution": choice(("sharegpt", "lognormal", "fixed")),
        "length_cv": positive(),
        **each("kv_cache_tokens block_size", positive(nullable=True)),
        "failed_requests": OPTIONAL,
        "schedule_error_p99_ms": OPTIONAL,
    },
    name="runs of a campaign",
)
"""What `schemas.RUNS` holds, and what the twin needs to draw the very same requests."""

REQUESTS = DataFrameSchema(
    {
        "run_id": label(),
        "request": whole(0),
        "adapter": whole(-1),
        # as asked, and as the server counted them
        **each("prompt_tokens output_tokens", whole(1)),
        **each("reported_prompt_tokens reported_output_tokens", OPTIONAL),
        "scheduled_s": number(0),
        # A request that never got so far, or had not when the window closed, lacks the later times.
        **each("sent_s first_token_s end_s", number(0, nullable=True)),
        "error": text(nullable=True),
    },
    name="requests",
)

CAMPAIGN_SERIES = DataFrameSchema(
    {
        "run_id": label(),
        "t_s": number(dtype="float32"),
        **each(
            "running waiting preempted_total prompt_tokens_total generated_tokens_total",
            number(0, dtype="float32", nullable=True),
        ),
        "kv_usage": number(0, 1, dtype="float32", nullable=True),
    },
    name="series of a campaign",
)

MICRO_STEPS = DataFrameSchema(
    {
        **each("engine_id model", label()),
        "adapter_slots": whole(0),
        "max_lora_rank": RANK,
        # 0: the batch holds requests of the base model only
        "rank": whole(0),
        **each("repeat point step", whole(0)),
        "batched_tokens": whole(1),
        **each("decodes prompts prefill_tokens context_tokens distinct_adapters", whole(0)),
        **each("running waiting loads", whole(0)),
        "step_ms": positive(),
        **each("schedule_ms output_ms", number(0)),
    },
    name="micro_steps",
)

CAMPAIGN_LOADS = DataFrameSchema(
    {
        **each("engine_id model", label()),
        "rank": whole(1),
        "max_lora_rank": RANK,
        "source": choice(("disk", "memory")),
        "index": whole(0),
        "load_ms": positive(),
    },
    name="adapter_loads of a campaign",
)

ENGINE_STARTS = DataFrameSchema(
    {
        "engine_id": text(unique=True),
        "model": text(),
        "adapter_slots": whole(0),
        "max_lora_rank": RANK,
        **each("kv_cache_tokens block_size weights_gib startup_s", positive(nullable=True)),
        "capture_s": OPTIONAL,
        "server_failure": text(nullable=True),
        "gpu_memory_utilization": number(0, 1),
        "cpu_kv_cache_gib": positive(),
        **each("max_num_batched_tokens max_num_seqs max_model_len", whole(1)),
    },
    name="engine_starts",
)

CAMPAIGN_TABLES: dict[str, DataFrameSchema] = {
    "runs": CAMPAIGN_RUNS,
    "requests": REQUESTS,
    "series": CAMPAIGN_SERIES,
    "micro_steps": MICRO_STEPS,
    "adapter_loads": CAMPAIGN_LOADS,
    "engine_starts": ENGINE_STARTS,
}
"""Tables of a campaign by the stem of their file name."""
