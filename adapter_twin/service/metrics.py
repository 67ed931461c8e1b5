"""What is reported of a run, defined as in ``vllm bench serve``, and how predictions are scored.

Throughputs count completed requests only. TTFT runs from a request's arrival to its first token,
TPOT is its mean time per token after the first, ITL pools the gaps of all completed requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from adapter_twin.workload.strict import require

if TYPE_CHECKING:
    import pandas as pd

    from adapter_twin.twin.records import Gaps, Records
    from adapter_twin.workload.scenario import Slo

Floats = NDArray[np.float64]

STARVATION_THRESHOLD = 0.9
"""Share of the offered tokens per second below which the reference study calls a run starved."""

PERCENTILES: Mapping[str, float] = {"median": 50.0, "p99": 99.0}


def summarize(records: Records, gaps: Gaps, duration_s: float) -> dict[str, float]:
    """Summarise a run as the benchmark client would.

    Parameters
    ----------
    records : Records
    gaps : Gaps
        Inter-token gaps of the completed requests.
    duration_s : float
        Window over which throughputs are taken.

    Returns
    -------
    dict
        ``completed_requests``; ``request_throughput`` in requests/s; ``input_throughput``,
        ``output_throughput`` and ``total_throughput`` in tokens/s; ``mean_``, ``median_`` and
        ``p99_`` of ``ttft_ms``, ``tpot_ms`` and ``itl_ms`` (NaN where no request completed).
    """
    done = np.isfinite(records.end_s)
    input_tokens = int(records.prompt_tokens[done].sum(dtype=np.int64))
    output_tokens = int(records.output_tokens[done].sum(dtype=np.int64))
    ttft_ms, tpot_ms = 1e3 * ttft_s(records)[done], 1e3 * tpot_s(records)
    tpot_ms = tpot_ms[np.isfinite(tpot_ms)]
    return {
        "completed_requests": int(done.sum()),
        "request_throughput": int(done.sum()) / duration_s,
        "input_throughput": input_tokens / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_throughput": (input_tokens + output_tokens) / duration_s,
        **_statistics("ttft_ms", ttft_ms, np.ones(len(ttft_ms), np.int64)),
        **_statistics("tpot_ms", tpot_ms, np.ones(len(tpot_ms), np.int64)),
        **_statistics("itl_ms", 1e3 * gaps.gap_s, gaps.count),
    }


def adapter_loading(steps: Any, duration_s: float) -> dict[str, float]:
    """Return how often adapters were copied into slots, and what of the time it took.

    Parameters
    ----------
    steps : recarray of `adapter_twin.twin.clock.STEPS`
    duration_s : float

    Returns
    -------
    dict
        ``adapter_loads``; ``adapter_loads_per_step``; ``loading_share`` of the window, between 0
        and 1, reads from disk included.
    """
    loads = int(steps.loads.sum())
    return {
        "adapter_loads": loads,
        "adapter_loads_per_step": loads / max(len(steps), 1),
        "loading_share": float(steps.load_s.sum(dtype=np.float64)) / duration_s,
    }


def ttft_s(records: Records) -> Floats:
    """Return each request's time to first token in s, NaN where none came."""
    return np.asarray(records.first_token_s - records.arrival_s)


def tpot_s(records: Records) -> Floats:
    """Return each request's time per output token after the first in s.

    NaN for a request that did not complete, or has one token only.
    """
    decoded = records.output_tokens - 1
    return np.asarray(
        (records.end_s - records.first_token_s) / np.where(decoded > 0, decoded, np.nan)
    )


def _statistics(name: str, values: Floats, counts: NDArray[np.int64]) -> dict[str, float]:
    total = int(counts.sum())
    mean = float(values @ counts) / total if total else float("nan")
    ranks = weighted_percentile(values, counts, list(PERCENTILES.values()))
    named = zip(PERCENTILES, ranks, strict=True)
    return {f"mean_{name}": mean} | {f"{label}_{name}": float(rank) for label, rank in named}


def weighted_percentile(
    values: Floats, counts: NDArray[np.int64], percentiles: ArrayLike
) -> Floats:
    """Return percentiles of a sample given as values and how often each occurs.

    The same as ``np.percentile(np.repeat(values, counts), percentiles)``, without the expansion;
    NaN for an empty sample.
    """
    total = int(counts.sum())
    if total == 0:
        return np.full(np.shape(percentiles), np.nan)
    order = np.argsort(values)
    last = np.cumsum(counts[order])  # one past each value's last place in the expanded sample
    position = np.asarray(percentiles, dtype=np.float64) / 100 * (total - 1)
    below = np.floor(position)
    low, high = (
        values[order[np.searchsorted(last, at, side="right")]] for at in (below, np.ceil(position))
    )
    return np.asarray(low + (high - low) * (position - below))


def per_adapter(records: Records, duration_s: float) -> pd.DataFrame:
    """Return `summarize`'s figures for each adapter apart, and its offered load.

    Returns
    -------
    pandas.DataFrame
        One row per adapter with at least one request, indexed by ``adapter`` (-1: base model).
        Gaps are pooled over adapters, so of ITL there is only the mean.
    """
    import pandas as pd

    done = np.isfinite(records.end_s)
    tokens = np.asarray(records.prompt_tokens, np.int64) + records.output_tokens
    frame = pd.DataFrame(
        {
            "adapter": records.adapter,
            "requests": 1,
            "completed_requests": done,
            "offered_tokens": tokens,
            "input_tokens": np.where(done, records.prompt_tokens, 0),
            "output_tokens": np.where(done, records.output_tokens, 0),
            "ttft_ms": np.where(done, 1e3 * ttft_s(records), np.nan),
            "tpot_ms": 1e3 * tpot_s(records),
            "decode_ms": np.where(done, 1e3 * (records.end_s - records.first_token_s), 0.0),
            "gaps": np.where(done, records.output_tokens - 1, 0),
        }
    )
    groups = frame.groupby("adapter")
    table = groups[["requests", "completed_requests"]].sum()
    table["offered_tokens_per_s"] = groups["offered_tokens"].sum() / duration_s
    for kind in ("input", "output"):
        table[f"{kind}_throughput"] = groups[f"{kind}_tokens"].sum() / duration_s
    table["total_throughput"] = table["input_throughput"] + table["output_throughput"]
    for name in ("ttft_ms", "tpot_ms"):
        table[f"mean_{name}"] = groups[name].mean()
        for label, percentile in PERCENTILES.items():
            table[f"{label}_{name}"] = groups[name].quantile(percentile / 100)
    gaps = groups["gaps"].sum()
    table["mean_itl_ms"] = groups["decode_ms"].sum() / gaps.where(gaps > 0)
    return table


def is_starved(
    total_throughput: float,
    offered_tokens_per_s: float,
    threshold: float = STARVATION_THRESHOLD,
) -> bool:
    """Return whether the throughput (tokens/s) falls below `threshold` of the offered load."""
    return bool(total_throughput < threshold * offered_tokens_per_s)


def slo_attainment(records: Records, slo: Slo, duration_s: float) -> float:
    """Return the share of requests that met the service objective.

    A request keeps the ITL limit if its own mean gap (its TPOT) does. Rejected requests missed.
    Of those cut off by the end of the window, the ones past the TTFT limit missed, and the ones
    whose outcome is open are left out.

    Returns
    -------
    float
        Between 0 and 1; NaN if the outcome of every request is open.
    """
    missed = np.array(records.rejected, dtype=np.bool_)
    decided = missed.copy()
    done = np.isfinite(records.end_s)
    if slo.ttft_ms is not None:
        started = np.isfinite(records.first_token_s)
        waited_s = np.where(started, records.first_token_s, duration_s) - records.arrival_s
        missed |= 1e3 * waited_s > slo.ttft_ms
        decided |= missed | started
    if slo.itl_ms is not None:
        missed |= 1e3 * tpot_s(records) > slo.itl_ms
        decided = missed | done
    return float(1 - missed[decided].mean()) if decided.any() else float("nan")


def jain_fairness(shares: ArrayLike) -> float:
    """Return Jain's index, (sum x)^2 / (n sum x^2): 1 if all are equal, 1/n if one takes all.

    From Jain, Chiu and Hawe, *A Quantitative Measure of Fairness* (1984). All zero is all equal.
    """
    x = np.asarray(shares, dtype=np.float64)
    require(x.size > 0 and bool(np.all(x >= 0)), "shares: need at least one, none negative")
    largest = float(x.max())
    if largest == 0:
        return 1.0
    x = x / largest  # squares of tiny or huge shares would leave the range of floats
    return float(x.sum() ** 2 / (x.size * (x**2).sum()))


def mape(measured: ArrayLike, predicted: ArrayLike) -> float:
    """Return the mean absolute percentage error, ``100 mean(|p - m| / |m|)``, in percent.

    >>> mape([100, 200], [125, 150])
    25.0
    """
    truth, guess = _pairs(measured, predicted)
    require(bool(np.all(truth != 0)), "measured: holds a zero; leave it out of a relative error")
    return float(100 * np.mean(np.abs(guess - truth) / np.abs(truth)))


def half_smape(measured: ArrayLike, predicted: ArrayLike) -> float:
    """Return the paper's halved SMAPE, ``100 mean(|p - m| / (|p| + |m|))``, in percent.

    About half of `mape`: quote it only beside the paper's own figures.
    """
    truth, guess = _pairs(measured, predicted)
    size = np.abs(truth) + np.abs(guess)
    return float(100 * np.mean(np.abs(guess - truth) / np.where(size > 0, size, 1)))


def _pairs(measured: ArrayLike, predicted: ArrayLike) -> tuple[Floats, Floats]:
    truth, guess = np.asarray(measured, np.float64), np.asarray(predicted, np.float64)
    require(truth.shape == guess.shape, f"predicted: shape {guess.shape}, measured {truth.shape}")
    require(truth.size > 0, "measured: is empty; an error needs at least one pair")
    return truth, guess


def replication_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return mean and Student-t confidence interval of a figure over independent replications.

    Returns
    -------
    mean, low, high : float
        The interval is infinite for a single replication.
    """
    sample = np.asarray(values, dtype=np.float64)
    require(sample.size > 0, "values: need at least one replication")
    require(0 < confidence < 1, f"confidence: must lie between 0 and 1, got {confidence}")
    mean = float(sample.mean())
    if sample.size == 1:
        return mean, float("-inf"), float("inf")
    error = float(sample.std(ddof=1)) / np.sqrt(sample.size)
    half_width = float(stdtrit(sample.size - 1, (1 + confidence) / 2)) * error
    return mean, mean - half_width, mean + half_width
