"""What a measured run becomes in the tables of a campaign."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd

from adapter_twin.campaign_schemas import CAMPAIGN_RUNS
from adapter_twin.config import deal_adapters
from adapter_twin.errors import one_line
from adapter_twin.profiling.campaign import Campaign
from adapter_twin.profiling.engine_flags import EngineFlags
from adapter_twin.strict import require


def run_row(
    campaign: Campaign,
    index: int,
    repeat: int,
    flags: EngineFlags,
    measured: Mapping[str, Any],
) -> pd.DataFrame:
    """Return a serving run's row of the table ``runs``.

    Parameters
    ----------
    campaign : Campaign
    index, repeat : int
        Which run of the campaign file, and which time it is served.
    flags : EngineFlags
        Of its server.
    measured : mapping
        Measured columns, ``status`` among them; the others are empty. Means of lengths are the
        campaign's: a prediction must not need the traffic that was drawn.
    """
    assert campaign.serving is not None
    run, lengths = campaign.serving.runs[index], campaign.serving.lengths
    adapters = deal_adapters(run.served_adapters, run.rates, run.ranks)
    row = {
        **dict.fromkeys(CAMPAIGN_RUNS.columns, np.nan),
        "duration_s": campaign.serving.duration_s,
        "sent_is_exact": True,
        "client_collapsed": False,
        **measured,
        "run_id": run_id(campaign, index, repeat),
        "campaign": campaign.name,
        "model": campaign.model_name,
        "rates_per_adapter": "-".join(map(_plain, run.rates)),
        "ranks": "-".join(map(str, run.ranks)),
        "served_adapters": run.served_adapters,
        "adapter_slots": run.adapter_slots,
        "max_lora_rank": run.max_lora_rank,
        "max_num_seqs": flags.max_num_seqs,
        "max_num_batched_tokens": flags.max_num_batched_tokens,
        "max_model_len": flags.max_model_len,
        "mean_input_tokens": lengths.mean_input_tokens,
        "mean_requested_output_tokens": lengths.mean_output_tokens,
        "length_distribution": lengths.distribution,
        "length_cv": lengths.cv,
        "offered_request_rate": sum(adapter.request_rate for adapter in adapters),
        "held_out": run.held_out,
        "repeat": repeat,
        "seed": campaign.run_seed(index),
        "source_path": f"serving.runs[{index}]",
    }
    return pd.DataFrame([row])


def run_id(campaign: Campaign, index: int, repeat: int) -> str:
    """Return the name of a serving run in the tables."""
    return f"{campaign.name}/run-{index:03d}-{repeat}"


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
