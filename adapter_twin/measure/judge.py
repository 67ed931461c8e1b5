"""Limits within which a serving run counts as measured.

A run beyond one of them is kept as ``doubtful``, with its reasons, and nothing is fitted to it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapter_twin.measure.client import Replay

FAILED_SHARE = 0.01
"""At most this share of the requests sent may fail, as one does whose tokens are not as asked."""

LATE_MS = 50.0
"""99 % of the requests must be sent within this time after they were due."""

SILENT_SHARE = 0.2
"""No token may come for at most this share of the window while requests are under way.

In the recorded campaign `cpu-small` it was 2 % at most.
"""

MERGED_SHARE = 0.5
"""At most this share of the tokens may come in a chunk with another: it shows no gap to it."""

UNREAD_SHARE = 0.1
"""At most this share of the samples of the metrics may be missing."""

MISCOUNTED_SHARE = 0.1
"""The server's counter of output tokens may differ by this share from what the client received.

Beside it, by a token for every request under way. In `cpu-small` it was 1 % at most.
"""


def doubt(seen: Replay, series: pd.DataFrame, unread: Sequence[str], period_s: float) -> str | None:
    """Return why a run does not count as measured, or None where it does.

    Parameters
    ----------
    seen : Replay
    series : pandas.DataFrame
        Samples of the server's metrics, as `adapter_twin.measure.scrape.record_series` has them.
    unread : sequence of str
        Why samples are missing.
    period_s : float
        Time between two samples.
    """
    return "; ".join(_doubts(seen, series, unread, period_s)) or None


def _doubts(
    seen: Replay, series: pd.DataFrame, unread: Sequence[str], period_s: float
) -> Iterator[str]:
    requests, window_s = seen.requests, seen.ended_s
    sent, errors = int(requests["sent_s"].notna().sum()), requests["error"].dropna()
    if len(errors) > FAILED_SHARE * sent:
        most = errors.value_counts().index[0]
        yield f"{len(errors)} of {sent} requests failed (at most {FAILED_SHARE:.0%}): {most}"
    if seen.schedule.p99_ms > LATE_MS:
        yield (
            f"the client sent 1 % of the requests {seen.schedule.p99_ms:.0f} ms or more late (at "
            f"most {LATE_MS:.0f} ms): lower the rate or free the machine"
        )
    done = requests[requests["end_s"].notna()]
    if done.empty:
        yield f"none of {sent} requests was completed"
    silence_s = longest_silence_s(requests, window_s)
    if silence_s > SILENT_SHARE * window_s:
        yield f"no token for {silence_s:.1f} s of {window_s:g} s (at most {SILENT_SHARE:.0%})"
    chunks, tokens = (done["itl_ms"].map(len) + 1).sum(), done["output_tokens"].sum()
    if chunks < (1 - MERGED_SHARE) * tokens:
        yield f"{tokens} tokens came in {chunks} chunks (at most {MERGED_SHARE:.0%} merged)"
    samples = round(window_s / period_s)
    if len(series) < (1 - UNREAD_SHARE) * samples:
        reason = f": {unread[-1]}" if unread else ""
        yield f"{len(series)} of {samples} samples (at most {UNREAD_SHARE:.0%} missing){reason}"
    within = series[series["t_s"] <= window_s]  # afterwards the client receives no more
    if len(within):
        at_s, counted = within.iloc[-1][["t_s", "generated_tokens_total"]]
        got = (token_times_s(requests) <= at_s).sum() * max(tokens / max(chunks, 1), 1.0)
        under_way = int(((requests["sent_s"] <= at_s) & ~(requests["end_s"] <= at_s)).sum())
        if abs(counted - got) > MISCOUNTED_SHARE * got + under_way:
            yield (
                f"the server's metrics count {counted:.0f} output tokens, the client {got:.0f} (at "
                f"most {MISCOUNTED_SHARE:.0%} apart)"
            )


def token_times_s(requests: pd.DataFrame) -> NDArray[np.float64]:
    """Return when each chunk of each request came, in s from the window's start."""
    begun = requests[requests["first_token_s"].notna()]
    gaps = (np.concatenate([[0.0], gaps_ms]) / 1e3 for gaps_ms in begun["itl_ms"])
    times = (at_s + np.cumsum(gap) for at_s, gap in zip(begun["first_token_s"], gaps, strict=True))
    return np.concatenate([*times, np.empty(0)])


def longest_silence_s(requests: pd.DataFrame, ended_s: float) -> float:
    """Return the longest time in which requests were under way and no token came.

    Examples
    --------
    >>> one = {"sent_s": 1.0, "first_token_s": 2.0, "end_s": 5.0, "itl_ms": [3000.0]}
    >>> longest_silence_s(pd.DataFrame([one | {"error": None}]), 60.0)
    3.0
    """
    live = requests[requests["sent_s"].notna() & requests["error"].isna()].sort_values("sent_s")
    busy_until_s = live["end_s"].fillna(ended_s).cummax().shift(fill_value=-np.inf)
    begins = live["sent_s"][live["sent_s"] > busy_until_s].to_numpy()
    ends = [ended_s] if live["end_s"].isna().any() else []
    tokens = token_times_s(live)
    moments = np.concatenate([begins, tokens, ends])
    order = np.argsort(moments, kind="stable")
    gaps = np.diff(moments[order])
    idle = order[1:] < len(begins)  # what comes before a beginning is no silence
    return float(gaps[~idle].max(initial=0.0))
