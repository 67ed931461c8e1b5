"""Prompt and output lengths, and outputs that end before the requested length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from adapter_twin.laws.estimator import Estimator
from adapter_twin.workload.lengths import LengthMarginals, draw_lengths
from adapter_twin.workload.traffic import Lengths

if TYPE_CHECKING:
    import pandas as pd

Portion = Annotated[float, Field(ge=0, le=1)]

LEVELS = 41
"""A length distribution is kept as its quantiles at this many levels."""

BLOCK_REST_TOKENS = 8.0
"""On average this much of a request's last KV block of 16 tokens is unused."""


class LengthLaw(Estimator):
    """The traffic's length distributions as quantiles, and how prompt and output go together.

    Measured KV tokens per running request are fewer than independent lengths would hold: long
    prompts have short outputs. The rank correlation is the one that gives the measured figure.

    Parameters
    ----------
    longest_output : float, optional
        Outputs of the histogram are cut off there, in its tokens. The longest outputs decide how
        long an adapter keeps its slot, so slot-gated runs tell how long they are.

    Attributes
    ----------
    prompt_quantiles_, output_quantiles_ : list of float
        Tokens at equally spaced levels, at the histograms' own means.
    rank_correlation_ : float
        Spearman correlation.
    kv_tokens_per_request_ : float
        Measured mean over running requests, in unsaturated runs.
    throughput_error_percent_ : dict
        MAPE of the twin's throughput of slot-gated runs, by candidate for `longest_output`.
    """

    longest_output: float | None
    prompt_quantiles_: Sequence[float] = ()
    prompt_levels_: Sequence[float] = ()
    output_quantiles_: Sequence[float] = ()
    output_levels_: Sequence[float] = ()
    kv_tokens_per_request_: float = 0.0
    rank_correlation_: float = 0.0
    throughput_error_percent_: Mapping[str, float] = {}

    def __init__(self, longest_output: float | None = None) -> None:
        self.longest_output = longest_output

    def fit(self, marginals: LengthMarginals, windows: pd.DataFrame) -> LengthLaw:
        """Fit to a length histogram and to windows of unsaturated runs (table ``windows``)."""
        from scipy.optimize import brentq

        for side in ("prompt", "output"):
            edges, counts = marginals.histogram(side)
            cumulative = np.concatenate(([0.0], np.cumsum(counts))) / np.sum(counts)
            kept = np.concatenate(([True], np.diff(cumulative) > 0))
            levels = np.linspace(0, 1, LEVELS)
            if side == "output":
                levels = np.sqrt(levels)  # finer towards the tail
            quantiles = np.interp(levels, cumulative[kept], np.asarray(edges)[kept])
            if side == "output":  # edges must increase, so the cap is not quite flat
                longest = self.longest_output or np.inf
                over = np.maximum(quantiles - longest, 0)
                quantiles = np.minimum(quantiles, longest) + 0.01 * over
            setattr(self, f"{side}_quantiles_", quantiles.tolist())
            setattr(self, f"{side}_levels_", levels.tolist())
        per_request = windows.groupby("run_id", observed=True)[["kv_tokens", "running"]].sum()
        self.kv_tokens_per_request_ = float((per_request.kv_tokens / per_request.running).median())
        self.rank_correlation_ = float(brentq(self._excess_kv, -0.9, 0.0, xtol=1e-3))
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a fitted law; raise `AdapterTwinError` unless its quantiles are some."""
        law = super().from_dict(values)
        _ = law.marginals
        return law

    def _excess_kv(self, rank_correlation: float) -> float:
        lengths = Lengths(
            mean_input_tokens=223.0, mean_output_tokens=197.0, rank_correlation=rank_correlation
        )
        rng = np.random.default_rng(0)
        prompt, output = (
            x.astype(float) for x in draw_lengths(lengths, 400_000, rng, self.marginals)
        )
        # A request holds its prompt all the while it emits its output, whose age is uniform.
        held = (prompt @ output + output @ output / 2) / output.sum() + BLOCK_REST_TOKENS
        return float(held) - self.kv_tokens_per_request_

    @property
    def marginals(self) -> LengthMarginals | None:
        """The distributions as `adapter_twin.workload.trace.generate` takes them, if fitted."""
        if not self.prompt_quantiles_:
            return None
        return LengthMarginals(
            prompt_edges=tuple(self.prompt_quantiles_),
            prompt_counts=tuple(np.diff(self.prompt_levels_).tolist()),
            output_edges=tuple(self.output_quantiles_),
            output_counts=tuple(np.diff(self.output_levels_).tolist()),
            rank_correlation=self.rank_correlation_,
        )


class EarlyStopLaw(Estimator):
    """Outputs that end by themselves before the requested length.

    Attributes
    ----------
    probability_ : float
        Share of the requests.
    kept_ : float
        Mean share of the requested output that such a request emits (uniform on 0 to twice that).
    """

    probability_: Portion
    kept_: Portion

    @classmethod
    def never(cls) -> EarlyStopLaw:
        """Return the law of requests that ignore the end of the sequence."""
        law = cls()
        law.probability_ = law.kept_ = 0.0
        return law

    def fit(self, runs: pd.DataFrame, series: pd.DataFrame) -> EarlyStopLaw:
        """Fit to unsaturated runs (tables ``runs`` and ``series``)."""
        by_run = series.groupby("run_id", observed=True).stopped_by_eos_total.max()
        stopped = by_run.reindex(runs.run_id).to_numpy()
        self.probability_ = float(np.nansum(stopped) / runs.completed_requests.sum())
        asked = runs.mean_requested_output_tokens * runs.completed_requests
        lost = 1 - runs.output_tokens.sum() / asked.sum()
        self.kept_ = float(np.clip(1 - lost / self.probability_, 0.0, 0.5))
        return self

    def apply(
        self, output_tokens: NDArray[np.int32], rng: np.random.Generator
    ) -> NDArray[np.int32]:
        """Return the tokens that requests of the given output lengths emit."""
        stops = rng.random(len(output_tokens)) < self.probability_
        emitted = output_tokens.copy()
        share = 2 * self.kept_ * rng.random(int(stops.sum()))
        emitted[stops] = np.maximum(np.rint(output_tokens[stops] * share), 1).astype(np.int32)
        return emitted
