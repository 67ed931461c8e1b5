"""When requests arrive: one process per source, superposed."""

from __future__ import annotations

import heapq
import random
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.workload.lengths import Floats
from adapter_twin.workload.traffic import Arrivals

Ints = NDArray[np.int32]


def draw_arrivals(
    arrivals: Arrivals, rates: Floats, duration_s: float, rng: np.random.Generator
) -> tuple[Floats, Ints]:
    """Draw the arrivals of a window.

    A rate that follows a sine is a constant one by a clock that runs as fast as the rate: arrivals
    are drawn by that clock, and their times told by the true one (inversion; Cinlar, *Introduction
    to Stochastic Processes*, 1975). A Poisson process stays one.

    Parameters
    ----------
    arrivals : Arrivals
        Any process but ``trace``.
    rates : float64, shape (sources,)
        Mean requests/s.
    duration_s : float
    rng : numpy.random.Generator

    Returns
    -------
    arrival_s : float64, shape (requests,)
        In increasing order.
    source : int32, shape (requests,)
    """
    if arrivals.num_prompts is not None:
        require(rates.sum() > 0, "num_prompts: no adapter has a request_rate, its share of them")
        shares = rates / rates.sum()
        dealt = rng.choice(len(rates), arrivals.num_prompts, p=shares).astype(np.int32)
        return np.zeros(arrivals.num_prompts), dealt
    if arrivals.process == "agullo2025":
        return reference_arrivals(rates, duration_s)
    period_s, amplitude = arrivals.period_s or duration_s, arrivals.amplitude
    swing_s = amplitude * period_s / (2 * np.pi)

    def elapsed_s(time_s: Any) -> Any:
        return time_s + swing_s * (1 - np.cos(2 * np.pi / period_s * time_s))

    window_s = elapsed_s(duration_s) if amplitude else duration_s
    if arrivals.process == "gamma":
        time_s, source = _renewals(rates, window_s, _GammaGaps(arrivals.cv), rng)
    elif arrivals.on_s is not None and arrivals.off_s is not None:
        gaps = _OnOffGaps(arrivals.on_s, arrivals.off_s)
        time_s, source = _renewals(rates, window_s, gaps, rng)
    else:
        time_s, source = _poisson_arrivals(rates, window_s, rng)
    if not amplitude:
        return time_s, source
    low, high = np.maximum(time_s - 2 * swing_s, 0), time_s
    for _ in range(60):  # to the last digit of a double
        middle = (low + high) / 2
        is_late = elapsed_s(middle) > time_s
        low, high = np.where(is_late, low, middle), np.where(is_late, middle, high)
    return np.maximum.accumulate(low), source


def _poisson_arrivals(
    rates: Floats, duration_s: float, rng: np.random.Generator
) -> tuple[Floats, Ints]:
    """Superpose one Poisson process per source."""
    counts = rng.poisson(rates * duration_s)
    total = int(counts.sum())
    # given their number, arrivals are uniform in time, whatever their source; sums of exponential
    # gaps, scaled to the window, are uniform times already sorted
    gaps = np.cumsum(rng.standard_exponential(total + 1))
    arrival_s = gaps[:-1] * (duration_s / gaps[-1])
    source = np.repeat(np.arange(len(rates), dtype=np.int32), counts)
    rng.shuffle(source)
    return arrival_s, source


class _Gaps(Protocol):
    """Gaps between a source's requests, in s, for the mean rate of each."""

    def first_s(self, rates: Floats, rng: np.random.Generator) -> Floats:
        """Draw the wait for the first request, where the window opens at a random time.

        Were it to open at a request, bursty sources would all burst together at 0.
        """

    def next_s(self, rates: Floats, rng: np.random.Generator) -> Floats:
        """Draw the gap to the next request."""


class _GammaGaps(NamedTuple):
    """Gaps of a Gamma distribution; a first wait is a uniform part of a length-biased one."""

    cv: float

    def first_s(self, rates: Floats, rng: np.random.Generator) -> Floats:
        shape = self.cv**-2  # of length-biased gaps it is one more
        length_biased = rng.standard_gamma(shape + 1, len(rates)) / (shape * rates)
        return rng.random(len(rates)) * length_biased

    def next_s(self, rates: Floats, rng: np.random.Generator) -> Floats:
        shape = self.cv**-2
        return rng.standard_gamma(shape, len(rates)) / (shape * rates)


class _OnOffGaps(NamedTuple):
    """Gaps of an interrupted Poisson process: one of two exponential distributions, by chance.

    They are the times to absorption of a source that is on and off, and a first wait has the same
    two means in shares by time (Kuczura, Bell System Technical Journal 52, 1973).
    """

    on_s: float
    off_s: float

    def _shares_and_rates(self, rates: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the share of the short gaps, and the two distributions' rates."""
        on_rates = rates * (self.on_s + self.off_s) / self.on_s
        both = on_rates + 1 / self.on_s + 1 / self.off_s
        short = (both + np.sqrt(both**2 - 4 * on_rates / self.off_s)) / 2
        long = on_rates / self.off_s / short
        return (on_rates - long) / (short - long), short, long

    def first_s(self, rates: Floats, rng: np.random.Generator) -> Floats:
        share, short, long = self._shares_and_rates(rates)
        return _one_of(rates * share / short, short, long, rng)

    def next_s(self, rates: Floats, rng: np.random.Generator) -> Floats:
        return _one_of(*self._shares_and_rates(rates), rng)


def _one_of(share: Floats, short: Floats, long: Floats, rng: np.random.Generator) -> Floats:
    """Draw from one of two exponential distributions, the first one with a probability."""
    rate = np.where(rng.random(len(share)) < share, short, long)
    return rng.standard_exponential(len(share)) / rate


def _renewals(
    rates: Floats, duration_s: float, gaps: _Gaps, rng: np.random.Generator
) -> tuple[Floats, Ints]:
    """Superpose one stationary renewal process per source."""
    source = np.flatnonzero(rates > 0).astype(np.int32)
    last_s = gaps.first_s(rates[source], rng)
    times, sources = [last_s], [source]
    while len(source):
        expected = rates[source] * np.maximum(duration_s - last_s, 0)
        batch = np.ceil(1.1 * expected).astype(np.int64) + 8  # seldom too few; then once more
        gap_source = np.repeat(source, batch)
        gap_s = gaps.next_s(rates[gap_source], rng)
        ends = np.cumsum(batch)
        elapsed_s = np.cumsum(gap_s)
        before_s = np.concatenate(([0.0], elapsed_s[ends[:-1] - 1]))
        time_s = elapsed_s + np.repeat(last_s - before_s, batch)
        times.append(time_s)
        sources.append(gap_source)
        last_s = time_s[ends - 1]
        unfinished = last_s < duration_s
        source, last_s = source[unfinished], last_s[unfinished]
    arrival_s, source = np.concatenate(times), np.concatenate(sources)
    inside = arrival_s < duration_s
    arrival_s, source = arrival_s[inside], source[inside]
    order = np.argsort(arrival_s, kind="stable")
    return arrival_s[order], source[order]


def reference_arrivals(rates: Floats, duration_s: float) -> tuple[Floats, Ints]:
    """Draw what the load generator of Agullo et al. (2025) drew; each of its runs had seed 0.

    It shuffled the adapters with Python's generator, then drew every gap between requests from one
    NumPy stream: a first gap per adapter in that order, and the next one as each request was sent.

    Parameters
    ----------
    rates : float64, shape (sources,)
        Requests/s.
    duration_s : float

    Returns
    -------
    arrival_s : float64, shape (requests,)
    source : int32, shape (requests,)
    """
    order = np.flatnonzero(rates > 0).tolist()
    random.Random(0).shuffle(order)
    stream = np.random.RandomState(0)
    expected = rates.sum() * duration_s
    gaps = stream.standard_exponential(int(expected + 6 * np.sqrt(expected)) + len(order) + 10)
    arrival_s, source, sent = _compiled()(np.array(order, np.int32), rates, gaps, duration_s)
    return arrival_s[:sent], source[:sent]


@cache
def _compiled() -> Any:
    import numba  # late: it takes its time

    return numba.njit(cache=True)(_send_in_order)


def _send_in_order(
    order: Ints, rates: Floats, gaps: Floats, duration_s: float
) -> tuple[Floats, Ints, int]:
    due = [(gaps[i] / rates[order[i]], order[i]) for i in range(len(order))]
    heapq.heapify(due)
    left = gaps[len(order) :]
    arrival_s, sources = np.empty(len(left)), np.empty(len(left), np.int32)
    sent = 0
    while sent < len(left) and len(due) > 0 and due[0][0] < duration_s:
        now_s, source = due[0]
        arrival_s[sent], sources[sent] = now_s, source
        heapq.heapreplace(due, (now_s + left[sent] / rates[source], source))
        sent += 1
    return arrival_s, sources, sent
