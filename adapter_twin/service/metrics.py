"""The service that a run gives, the benchmark's figures of it, and errors of prediction.

`service` is the one definition, and counts every arrival. `summarize` counts completed requests
only, as ``vllm bench serve`` and so the measured tables do. TTFT runs from a request's arrival to
its first token, TPOT is its mean time per token after the first, ITL pools the gaps of all
completed requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapter_twin.errors import require

if TYPE_CHECKING:
    import pandas as pd

    from adapter_twin.twin.records import Gaps, Records, Simulation
    from adapter_twin.workload.adapters import Adapter
    from adapter_twin.workload.scenario import Slo

Floats = NDArray[np.float64]

STARVATION_THRESHOLD = 0.9
"""Share of the offered tokens per second below which the reference study calls a run starved."""

PERCENTILES: Mapping[str, float] = {"median": 50.0, "p99": 99.0}
"""These are told of every distribution, besides its mean."""

RESAMPLES = 2000
"""An interval is taken from n bootstrap samples."""


def shown(value: Any) -> str:
    """Return a figure with four digits, and whole where it has more before the point."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Service(dict[str, Any]):
    """A run's figures by name, as `service` tells them; it shows itself as a table."""

    def _shown(self) -> dict[str, str]:
        return {name: shown(value) for name, value in self.items()}

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {text}" for name, text in self._shown().items())

    def _repr_html_(self) -> str:
        import pandas as pd

        return str(pd.DataFrame({"service": self._shown()}).to_html())


def service(
    records: Records,
    gaps: Gaps | None,
    duration_s: float,
    *,
    warm_up_s: float = 0.0,
    slo: Slo | None = None,
    adapters: Sequence[Adapter] = (),
) -> Service:
    """Return the service of a run from the end of its warm-up on.

    TTFT is over every request that arrives in this window, and not after it, as some may that a
    client has held back. One without a first token, dropped or
    still waiting, counts with its wait so far. Where more than 1 % of them are without, the p99 is
    not known yet: it and the mean are lower bounds, and with half of them without the median is.

    Parameters
    ----------
    records : Records
    gaps : Gaps, optional
        Left out, the mean ITL is taken from the records, and there is no median or p99 of it.
    duration_s : float
        End of the run, in s.
    warm_up_s : float
        Begin of the window, in s.
    slo : Slo, optional
    adapters : sequence of Adapter
        Those of the workload, for the name of the worst-served one; without them it is an index.

    Returns
    -------
    Service
        - ``arrived_requests``: ``completed_requests``, ``unfinished_requests`` (of which
          ``never_started_requests`` have no first token) and ``dropped_requests``: the client's
          cap was reached, or they are longer than ``max_model_len``. These last ones count in
          nothing else;
        - ``offered_tokens_per_s``, prompt and output tokens of the arrivals;
          ``request_throughput`` in requests/s, ``input_throughput``, ``output_throughput`` and
          ``total_throughput`` in tokens/s of what completes in the window, whenever it came;
          ``starved``, by `is_starved`; with an SLO ``slo_attainment``;
        - ``mean_ttft_ms``, ``median_ttft_ms``, ``p99_ttft_ms``, ``ttft_is_lower_bound``;
        - the benchmark's figures, of the completed requests: ``completed_mean_ttft_ms``,
          ``completed_median_ttft_ms``, ``completed_p99_ttft_ms``; mean, median and p99 of
          ``tpot_ms`` and of ``itl_ms``, of the gaps that end in the window;
        - ``prefix_hit_rate``, the share of the scheduled requests' prompt tokens that the prefix
          cache held, where there is one;
        - ``worst_adapter``, the one with the longest mean TTFT; its ``worst_adapter_requests``,
          ``worst_adapter_mean_ttft_ms`` and ``worst_adapter_p99_ttft_ms``.

        NaN, or None for the adapter, where there is nothing to count.

    Raises
    ------
    AdapterTwinError
        The warm-up leaves no window.
    """
    window_s = duration_s - warm_up_s
    require(window_s > 0, f"warm_up_s: {warm_up_s:g} s leave no window of {duration_s:g} s")
    arrived = records[(records.arrival_s >= warm_up_s) & (records.arrival_s <= duration_s)]
    refused, arrived = int(arrived.refused.sum()), arrived[~arrived.refused]
    ended = records[records.end_s >= warm_up_s]  # false for those without an end
    completed = arrived[np.isfinite(arrived.end_s)]
    started, ttft_ms = np.isfinite(arrived.first_token_s), waits_ms(arrived, duration_s)
    dropped = int(arrived.rejected.sum())
    offered = _throughput(arrived, window_s)["total_throughput"]
    throughput = _throughput(ended, window_s)
    p99_place = math.ceil(PERCENTILES["p99"] / 100 * (len(arrived) - 1))
    return Service(
        arrived_requests=len(arrived) + refused,
        completed_requests=len(completed),
        unfinished_requests=len(arrived) - len(completed) - dropped,
        never_started_requests=int((~started).sum()) - dropped,
        dropped_requests=dropped + refused,
        offered_tokens_per_s=offered,
        **throughput,
        starved=bool(is_starved(throughput["total_throughput"], offered)),
        **({} if slo is None else {"slo_attainment": slo_attainment(arrived, slo, duration_s)}),
        **statistics("ttft_ms", ttft_ms),
        ttft_is_lower_bound=bool(len(arrived) > 0 and p99_place >= started.sum()),
        **{f"completed_{k}": v for k, v in statistics("ttft_ms", 1e3 * ttft_s(completed)).items()},
        **_itl_ms(completed, gaps, warm_up_s),
        **_tpot_ms(completed),
        **_prefix_hits(arrived),
        **_worst_adapter(arrived.adapter, ttft_ms, adapters),
    )


def service_of(run: Simulation, *, slo: Slo | None = None, warm_up_s: float = 0.0) -> Service:
    """Return the `service` of a simulated run, its adapters by name.

    Where requests wait for answers, what arrives is what the engine lets come: then ``starved`` is
    None, as throughput cannot fall short of that for long, and ``unsent_requests`` counts those
    that never came, the turns of unfinished sessions and prompts still without a place. They count
    in nothing else.

    Parameters
    ----------
    run : Simulation
    slo : Slo, optional
    warm_up_s : float
        Begin of the window, in s.

    Examples
    --------
    See `adapter_twin.twin.simulate.simulate`.
    """
    told = service(
        run.records,
        run.gaps,
        run.duration_s,
        warm_up_s=warm_up_s,
        slo=slo,
        adapters=run.workload.adapters,
    )
    if run.unsent_requests is not None:
        told |= {"starved": None, "unsent_requests": run.unsent_requests}
    return told


def waits_ms(records: Records, until_s: float) -> Floats:
    """Return each request's TTFT in ms; one without a first token counts with its wait so far."""
    told_s = np.where(np.isfinite(records.first_token_s), records.first_token_s, until_s)
    return np.asarray(1e3 * (told_s - records.arrival_s))


def worst_served(adapter: NDArray[np.int32], ttft_ms: Floats) -> int | None:
    """Return the adapter with the longest mean TTFT, None where only the base model was asked.

    An adapter without a slot is passed over by the requests of those that have one, so means over
    all requests hide it.
    """
    own = adapter >= 0
    if not own.any():
        return None
    waited_ms, requests = np.bincount(adapter[own], ttft_ms[own]), np.bincount(adapter[own])
    return int(np.argmax(waited_ms / np.maximum(requests, 1)))


def _worst_adapter(
    adapter: NDArray[np.int32], ttft_ms: Floats, adapters: Sequence[Adapter]
) -> dict[str, Any]:
    """Return the worst-served adapter and its figures, as `service` tells them."""
    worst = worst_served(adapter, ttft_ms)
    own_ms = ttft_ms[adapter == worst] if worst is not None else ttft_ms[:0]
    told = statistics("ttft_ms", own_ms)
    return {
        "worst_adapter": adapters[worst].name if adapters and worst is not None else worst,
        "worst_adapter_requests": len(own_ms),
        "worst_adapter_mean_ttft_ms": told["mean_ttft_ms"],
        "worst_adapter_p99_ttft_ms": told["p99_ttft_ms"],
    }


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
    completed = records[np.isfinite(records.end_s)]
    return {
        "completed_requests": len(completed),
        **_throughput(completed, duration_s),
        **statistics("ttft_ms", 1e3 * ttft_s(completed)),
        **_tpot_ms(completed),
        **statistics("itl_ms", 1e3 * gaps.gap_s, gaps.count),
    }


def _throughput(completed: Records, window_s: float) -> dict[str, float]:
    input_tokens = int(completed.prompt_tokens.sum(dtype=np.int64))
    output_tokens = int(completed.output_tokens.sum(dtype=np.int64))
    return {
        "request_throughput": len(completed) / window_s,
        "input_throughput": input_tokens / window_s,
        "output_throughput": output_tokens / window_s,
        "total_throughput": (input_tokens + output_tokens) / window_s,
    }


def _tpot_ms(completed: Records) -> dict[str, float]:
    tpot_ms = 1e3 * tpot_s(completed)
    return statistics("tpot_ms", tpot_ms[np.isfinite(tpot_ms)])


def _itl_ms(completed: Records, gaps: Gaps | None, since_s: float) -> dict[str, float]:
    if gaps is not None:
        late = gaps.end_s >= since_s
        return statistics("itl_ms", 1e3 * gaps.gap_s[late], gaps.count[late])
    count = int(completed.output_tokens.sum(dtype=np.int64)) - len(completed)
    decode_s = float((completed.end_s - completed.first_token_s).sum())
    return {"mean_itl_ms": 1e3 * decode_s / count if count else math.nan}


def _prefix_hits(records: Records) -> dict[str, float]:
    """Return the hit rate of the prefix cache, or nothing where there is none."""
    looked_up = records.cached_tokens >= 0
    if not looked_up.any():
        return {}
    cached, prompt = records.cached_tokens[looked_up], records.prompt_tokens[looked_up]
    return {"prefix_hit_rate": float(cached.sum(dtype=np.int64) / prompt.sum(dtype=np.int64))}


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


def statistics(
    name: str, values: Floats, counts: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Return mean, median and p99 of a sample, each before `name`; NaN for an empty one."""
    percentiles = list(PERCENTILES.values())
    total = len(values) if counts is None else int(counts.sum())
    if not total:
        mean, ranks = math.nan, np.full(len(percentiles), np.nan)
    elif counts is None:
        mean, ranks = float(values.mean()), np.percentile(values, percentiles)
    else:
        mean = float(values @ counts) / total
        ranks = weighted_percentile(values, counts, percentiles)
    named = zip(PERCENTILES, ranks, strict=True)
    return {f"mean_{name}": mean} | {f"{label}_{name}": float(rank) for label, rank in named}


def weighted_percentile(
    values: Floats, counts: NDArray[np.int64], percentiles: ArrayLike
) -> Floats:
    """Return percentiles of a sample given as values and how often each occurs.

    Parameters
    ----------
    values : float64, shape (n,)
    counts : int64, shape (n,)
    percentiles : array_like
        From 0 to 100.

    Returns
    -------
    float64, the shape of `percentiles`
        The same as ``np.percentile(np.repeat(values, counts), percentiles)``, without the
        expansion; NaN for an empty sample.
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
    total_throughput: Any, offered_tokens_per_s: Any, threshold: float = STARVATION_THRESHOLD
) -> Any:
    """Return whether throughput falls short of the offered load; of one run, or of columns.

    Parameters
    ----------
    total_throughput : float or array
        Tokens/s; a run without figures (NaN) is starved.
    offered_tokens_per_s : float or array
    threshold : float
        Share of the offered load.

    >>> bool(is_starved(total_throughput=800, offered_tokens_per_s=1000))
    True
    """
    return np.logical_not(total_throughput >= threshold * offered_tokens_per_s)


def slo_attainment(records: Records, slo: Slo, duration_s: float) -> float:
    """Return the share of requests that met the service objective.

    A request keeps the ITL limit if its own mean gap (its TPOT) does. Rejected requests missed.
    Of those cut off by the end of the window, the ones past the TTFT limit missed, and the ones
    whose outcome is open are left out.

    Parameters
    ----------
    records : Records
    slo : Slo
    duration_s : float
        End of the window, in s.

    Returns
    -------
    float
        Between 0 and 1; NaN if the outcome of every request is open.
    """
    missed = np.array(records.rejected, dtype=np.bool_)
    decided = missed.copy()
    if slo.ttft_ms is not None:
        missed |= waits_ms(records, duration_s) > slo.ttft_ms
        decided = missed | np.isfinite(records.first_token_s)
    if slo.itl_ms is not None:
        missed |= 1e3 * tpot_s(records) > slo.itl_ms
        decided = missed | np.isfinite(records.end_s)
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


def mean_interval(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by bootstrap; NaN for fewer than two values."""
    from scipy.stats import bootstrap

    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return math.nan, math.nan
    told = bootstrap((sample,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=seed)
    return float(told.confidence_interval.low), float(told.confidence_interval.high)
