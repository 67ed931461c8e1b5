"""The raw run folders of the reference study, read one by one.

A run is a folder ``_SLOTS_SERVED_MAXRANK_``; its parent names ranks and rates, one way per
campaign. It holds the client's output (``log_*.out``), the sampled server metrics (``*.npy``) and,
where the server failed, the reason (``server_err.log``).

Two things cannot be derived from these files. Without the client's ``arrivals.csv``,
``sent_requests`` is estimated from counters. And a series that never shows a running request has
nothing to tell when the hour began: it is taken to stop 15 s after the hour, as the client's code
asks, and its counters to be missing.
"""

import math
import operator
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from adapter_twin.errors import AdapterTwinError, one_line, require

Floats = npt.NDArray[np.float64]

RESULTS = "benchmarks/lora/definitive_results"
HOUR_S = 3600.0
SAMPLED_AFTER_S = 15.0
CLIENT_CAP = 24_000
"""From that many in-flight requests on, the load generator counts as out of ports."""


class PublishedCampaign(NamedTuple):
    """Where a campaign's runs lie and how the folder above a run names its ranks and rates."""

    name: str
    prefix: str
    folder: str
    traffic: re.Pattern[str]


CAMPAIGNS = (
    PublishedCampaign(
        "twin_validation",
        "dt_real",
        "digital_twin_modelling/real_results",
        re.compile(r"rank_(?P<ranks>\d+)_rates_(?P<rates>[\d.]+(_[\d.]+)*)"),
    ),
    PublishedCampaign(
        "optimum_grid",
        "ml_test",
        "ml_modelling/test_dataset",
        re.compile(r"rate_(?P<rates>[\d.]+(-[\d.]+)*)_size_(?P<ranks>\d+(-\d+)*)"),
    ),
)

# Column -> file, in the order of the published table.
SERIES_FILES = {
    "stopped_by_eos_total": "finished",
    "running": "num_running",
    "waiting": "num_waiting",
    "preempted_total": "num_preempted",
    "kv_usage": "gpu_cache_usage_perc",
    "prompt_tokens_total": "processed_tokens_prompt",
    "generated_tokens_total": "processed_tokens_token",
}

# Column -> label in the client's report.
REPORT = {
    "duration_s": "Benchmark duration (s)",
    "completed_requests": "Successful requests",
    "input_tokens": "Total input tokens",
    "output_tokens": "Total generated tokens",
    "input_throughput": "Input token throughput (tok/s)",
    "output_throughput": "Output token throughput (tok/s)",
    **{
        f"{statistic.lower()}_{figure.lower()}_ms": f"{statistic} {figure} (ms)"
        for figure in ("TTFT", "TPOT", "ITL")
        for statistic in ("Mean", "Median", "P99")
    },
}

# The published tables count torch's lower-case "address already in use" as unknown.
FAILURE_SIGNS = {
    "kv_lt_max_seq_len": "larger than the available KV cache memory",
    "no_mem_cache_blocks": "No available memory for the cache blocks",
    "oom": "out of memory",
    "illegal_mem_access": "illegal memory access",
    "port_in_use": "Address already in use",
}


def read_run(
    folder: Path, campaign: PublishedCampaign
) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Parse one run folder.

    Returns
    -------
    run : dict
        The run's row of the table ``runs``.
    series : pandas.DataFrame or None
        Its rows of ``series``; None where the server never started.

    Raises
    ------
    AdapterTwinError
        A name that does not parse, a missing or malformed log, a truncated series.
    """
    run = read_names(folder, campaign)
    logs = sorted(folder.glob("log_*.out"))
    require(bool(logs), f"{folder}: no client log (log_*.out); fetch the folder again")
    log = logs[-1].read_text(errors="replace")  # The job number in the name grows with time.
    series = read_series(folder) if (folder / "time.npy").is_file() else None
    report = read_report(log, folder)
    max_num_seqs = re.search(r'--max-num-seqs="?(\d+)', log)
    if max_num_seqs is None:
        raise AdapterTwinError(
            f"{folder}: the client log names no --max-num-seqs; it is truncated, fetch it again"
        )
    run["max_num_seqs"] = int(max_num_seqs[1])
    run["status"] = _status(folder, report, series)
    run |= read_traffic(log, folder)
    run |= report
    run["total_throughput"] = run["input_throughput"] + run["output_throughput"]
    run |= summarize_series(series)
    run["sent_requests"], run["sent_is_exact"] = _sent_requests(folder, run, series)
    run["client_collapsed"] = bool(run["waiting_max"] + run["running_max"] >= CLIENT_CAP)
    if series is not None:
        series = series.astype("float32")
        series.insert(0, "run_id", run["run_id"])
    return run, series


def read_names(folder: Path, campaign: PublishedCampaign) -> dict[str, Any]:
    """Read a run's configuration from the names of its folder and of the two above."""
    leaf = re.fullmatch(r"_(\d+)_(\d+)_(\d+)_", folder.name)
    traffic = campaign.traffic.fullmatch(folder.parent.name)
    if leaf is None or traffic is None:
        raise AdapterTwinError(
            f"{folder}: not the name of a {campaign.name} run; expected "
            f"{campaign.traffic.pattern}/_SLOTS_SERVED_MAXRANK_"
        )
    slots, served, max_lora_rank = map(int, leaf.groups())
    ranks = traffic["ranks"]
    if campaign.name == "twin_validation":
        # The folder names the highest rank of the mix only.
        ranks = "-".join(str(rank) for rank in (8, 16, 32) if rank <= int(ranks))
    path = f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name}"
    return {
        "run_id": f"{campaign.prefix}/{path}",
        "campaign": campaign.name,
        "model": folder.parent.parent.name,
        "rates_per_adapter": traffic["rates"].replace("_", "-"),
        "ranks": ranks,
        "served_adapters": served,
        "adapter_slots": slots,
        "max_lora_rank": max_lora_rank,
        "source_path": f"{RESULTS}/{campaign.folder}/{path}",
    }


def read_report(log: str, folder: Path) -> dict[str, float]:
    """Read the client's closing report: all NaN where the client did not get that far."""
    start = log.find("Serving Benchmark Intermediate Result")
    if start < 0:
        return dict.fromkeys(REPORT, np.nan)
    lines = (line.partition(":") for line in log[start:].splitlines())
    values = {label.strip(): value.strip() for label, _, value in lines}
    for label in REPORT.values():
        require(
            label in values,
            f"{folder}: the client's report lacks {label!r}; the log is truncated, fetch it again",
        )
    return {column: _float(values[label], label, folder) for column, label in REPORT.items()}


def read_traffic(log: str, folder: Path) -> dict[str, Any]:
    """Read the traffic that the client announced, missing where the server never started.

    Returns
    -------
    dict
        ``rate_values`` (requests/s) and ``rate_counts`` (adapters) as text, their product
        ``offered_request_rate``, and the mean lengths over the pool from which the client drew.
    """
    rates = re.search(r"Adapter rates\. Values: \[(.*?)\]\. Counts: \[(.*?)\]", log)
    pool = re.search(
        r"Prompts retrieved: (\d+) \. Total input tokens: (\d+) \. Total output tokens: (\d+)", log
    )
    if rates is None or pool is None:
        names = ("offered_request_rate", "mean_input_tokens", "mean_requested_output_tokens")
        return {"rate_values": None, "rate_counts": None, **dict.fromkeys(names, np.nan)}
    values, counts = (
        [_float(x, "Adapter rates", folder) for x in rates[i].split()] for i in (1, 2)
    )
    prompts, input_tokens, output_tokens = (int(count) for count in pool.groups())
    sound = len(values) == len(counts) and prompts > 0
    require(sound, f"{folder}: malformed traffic in the client log; fetch it again")
    return {
        "rate_values": " ".join(rates[1].split()),
        "rate_counts": " ".join(rates[2].split()),
        # exactly rounded, so that the sum does not depend on the machine
        "offered_request_rate": math.fsum(map(operator.mul, values, counts)),
        "mean_input_tokens": input_tokens / prompts,
        "mean_requested_output_tokens": output_tokens / prompts,
    }


def _float(text: str, label: str, folder: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise AdapterTwinError(
            f"{folder}: {label!r} in the client log is {text!r}, not a number; fetch the log again"
        ) from None


def read_series(folder: Path) -> pd.DataFrame:
    """Read the sampled metrics against the time since the start of the hour (``t_s``).

    The client aborts what is unfinished at the end of the hour, so the last sample that shows a
    running request is placed at 3600 s. The sampler writes 0 for a token counter that it fails to
    parse, which is each one past 1e6: such zeros are missing values.
    """
    time = _load(folder / "time.npy")
    columns = {column: _load(folder / f"{file}.npy") for column, file in SERIES_FILES.items()}
    for column, values in columns.items():
        require(
            values.shape == time.shape and time.ndim == 1 and time.size > 0,
            f"{folder / SERIES_FILES[column]}.npy: shape {values.shape}, but time.npy has "
            f"{time.shape}; fetch the folder again",
        )
    busy = np.flatnonzero(columns["running"] > 0)
    if busy.size == 0:
        missing = dict.fromkeys(columns, np.full(time.size, np.nan))
        return pd.DataFrame({"t_s": time - time[-1] + HOUR_S + SAMPLED_AFTER_S, **missing})
    for column in ("prompt_tokens_total", "generated_tokens_total"):
        counter = columns[column]
        lost = (counter == 0) & (np.maximum.accumulate(counter) > 0)
        columns[column] = np.where(lost, np.nan, counter)
    return pd.DataFrame({"t_s": time - time[busy[-1]] + HOUR_S, **columns})


def _load(path: Path) -> Floats:
    require(path.is_file(), f"{path}: no such file; fetch it again")
    try:
        # Published data must never run code: pickled objects are refused.
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
    except (ValueError, OSError, EOFError) as error:
        raise AdapterTwinError(
            f"{path}: malformed or truncated series ({one_line(error)}); fetch it again"
        ) from None


def summarize_series(series: pd.DataFrame | None) -> dict[str, float]:
    """Average queue and KV figures over the samples within the hour.

    "Second half" starts midway between the first and the last of these samples; the slope of the
    queue (requests/s) is that of a straight line through them.
    """
    names = (
        *("running_mean", "running_max", "running_mean_2nd_half"),
        *("waiting_mean", "waiting_max", "waiting_last", "waiting_slope_2nd_half_per_s"),
        *("kv_usage_mean", "kv_usage_max", "preemptions"),
    )
    if series is None or series["running"].isna().all():
        return dict.fromkeys(names, np.nan)
    hour = series[series["t_s"].between(0, HOUR_S)]
    t_s, waiting = hour["t_s"].to_numpy(), hour["waiting"].to_numpy()
    late = t_s >= (t_s[0] + t_s[-1]) / 2
    slope = np.polyfit(t_s[late], waiting[late], 1)[0] if late.sum() > 1 else np.nan
    values = (
        *(hour["running"].mean(), hour["running"].max(), hour["running"][late].mean()),
        *(waiting.mean(), waiting.max(), waiting[-1], slope),
        *(hour["kv_usage"].mean(), hour["kv_usage"].max(), hour["preempted_total"].iloc[-1]),
    )
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _status(folder: Path, report: dict[str, float], series: pd.DataFrame | None) -> str:
    if not np.isnan(report["duration_s"]):
        return "ok"
    if series is not None:
        return "log_truncated_series_ok"
    errors = folder / "server_err.log"
    text = errors.read_text(errors="replace") if errors.is_file() else ""
    failure = next((name for name, sign in FAILURE_SIGNS.items() if sign in text), "unknown")
    return f"failed:{failure}"


def _sent_requests(
    folder: Path, run: dict[str, Any], series: pd.DataFrame | None
) -> tuple[float, bool]:
    """Return the requests sent and whether that is a count; else it is an estimate."""
    if run["status"] != "ok":
        return np.nan, False
    arrivals = folder / "arrivals.csv"
    if arrivals.is_file():
        return float(len(arrivals.read_text().splitlines()) - 1), True
    if series is None or run["waiting_max"] > CLIENT_CAP:
        return HOUR_S * run["offered_request_rate"], False
    running = series.loc[series["t_s"] <= HOUR_S, "running"].iloc[-1]
    return run["completed_requests"] + running + run["waiting_last"], False
