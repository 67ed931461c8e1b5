"""What a measured run becomes in the tables of a campaign."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd

from adapter_twin.errors import one_line
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.tables.campaign_schemas import CAMPAIGN_RUNS
from adapter_twin.workload.scenario import Workload
from adapter_twin.workload.strict import require


def serving_columns(
    flags: EngineFlags, workload: Workload, rates: Sequence[float], ranks: Sequence[int]
) -> dict[str, Any]:
    """Return what the table ``runs`` says of engine and traffic before anything is measured.

    Means of lengths are the distribution's: a prediction must not need the traffic that was drawn.
    `rates` and `ranks` are dealt over the adapters.
    """
    lengths = workload.lengths
    return {
        "rates_per_adapter": "-".join(map(_plain, rates)),
        "ranks": "-".join(map(str, ranks)),
        "served_adapters": flags.max_cpu_loras,
        "adapter_slots": flags.max_loras,
        "max_lora_rank": flags.max_lora_rank,
        "max_num_seqs": flags.max_num_seqs,
        "max_num_batched_tokens": flags.max_num_batched_tokens,
        "max_model_len": flags.max_model_len,
        "mean_input_tokens": lengths.mean_input_tokens,
        "mean_requested_output_tokens": lengths.mean_output_tokens,
        "length_distribution": lengths.distribution,
        "length_cv": lengths.cv,
        "offered_request_rate": workload.offered_request_rate,
    }


def run_row(columns: Mapping[str, Any], measured: Mapping[str, Any]) -> pd.DataFrame:
    """Return a serving run's row of the table ``runs``.

    Parameters
    ----------
    columns : mapping
        What was known before; it wins over what was measured.
    measured : mapping
        Measured columns, ``status`` among them; the others are empty.
    """
    empty = dict.fromkeys(CAMPAIGN_RUNS.columns, np.nan)
    sent = {"sent_is_exact": True, "client_collapsed": False}
    return pd.DataFrame([{**empty, **sent, **measured, **columns}])


def failed(reason: str) -> str:
    """Return the status of a run that failed, in one line."""
    return f"failed:{one_line(reason or 'no reason given')}"


def kv_cache(base_url: str) -> dict[str, float]:
    """Ask a running server for the size of its KV cache and of a block, in tokens."""
    from prometheus_client.parser import text_string_to_metric_families

    metric = "vllm:cache_config_info"
    url = f"{base_url}/metrics/?{urlencode({'name[]': metric})}"
    with urllib.request.urlopen(url, timeout=30) as response:
        text = response.read().decode()
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    labels = next((s.labels for s in samples if s.name == metric), {})
    names = ("num_gpu_blocks", "block_size")
    require(all(labels.get(name, "").isdigit() for name in names), f"metrics: {metric} is missing")
    blocks, block_size = (int(labels[name]) for name in names)
    return {"kv_cache_tokens": blocks * block_size, "block_size": block_size}


def _plain(rate: float) -> str:
    """Return a rate without an exponent, which the table does not know."""
    return np.format_float_positional(rate, trim="-")
