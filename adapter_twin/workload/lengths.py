"""Prompt and output lengths: measured histograms or laws, scaled to given means.

Lengths are drawn from tables of equally likely values in increasing order: exact in the mean, and
a look-up per request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtr, ndtri

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.workload.strict import LONGEST_TOKENS, Many, NotNegative, dataclass
from adapter_twin.workload.traffic import Lengths

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

QUANTILES = 1 << 16
"""A length table has as many entries as 16 random bits can pick."""


@dataclass(frozen=True)
class LengthMarginals:
    """Histograms of prompt and output lengths.

    Attributes
    ----------
    prompt_edges, output_edges : tuple of float
        Bin edges in tokens, increasing, one more than counts. Lengths are uniform within a bin.
    prompt_counts, output_counts : tuple of float
    rank_correlation : float
        Spearman correlation of prompt and output length.
    """

    prompt_edges: Many[NotNegative]  # tuples, so that equal histograms hash alike
    prompt_counts: Many[NotNegative]
    output_edges: Many[NotNegative]
    output_counts: Many[NotNegative]
    rank_correlation: Annotated[float, Field(ge=-1, le=1)] = 0.0

    def __post_init__(self) -> None:
        for side in ("prompt", "output"):
            edges, counts = self.histogram(side)
            require(len(edges) == len(counts) + 1, f"{side}_edges: give one more edge than counts")
            require(bool(np.all(np.diff(edges) > 0)), f"{side}_edges: must increase")
            require(sum(counts) > 0, f"{side}_counts: must not all be zero")

    def histogram(self, side: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return edges and counts of one side, ``prompt`` or ``output``."""
        return getattr(self, f"{side}_edges"), getattr(self, f"{side}_counts")


def draw_lengths(
    lengths: Lengths,
    size: int,
    rng: np.random.Generator,
    marginals: LengthMarginals | None,
    samples: int = 1,
) -> tuple[Ints, Ints]:
    """Draw prompt and output lengths, coupled by a Gaussian copula.

    Parameters
    ----------
    lengths : Lengths
    size : int
    rng : numpy.random.Generator
    marginals : LengthMarginals, optional
        Needed for ``sharegpt`` lengths only.
    samples : int
        Each n in a row have the same prompt, and outputs of their own.

    Returns
    -------
    prompt_tokens, output_tokens : int32, shape (size,)
    """
    means = lengths.mean_input_tokens, lengths.mean_output_tokens
    correlation = lengths.rank_correlation
    if lengths.distribution == "fixed":
        return np.full(size, means[0], np.int32), np.full(size, means[1], np.int32)
    if lengths.distribution == "lognormal":
        shape = (lengths.cv,)
        prompt, output = (_length_table(_lognormal_quantiles, shape, mean) for mean in means)
    elif marginals is None:
        raise AdapterTwinError(
            "distribution: sharegpt needs measured length histograms, which this calibration "
            "lacks; use lognormal or fixed lengths"
        )
    else:
        prompt = _length_table(_histogram_quantiles, marginals.histogram("prompt"), means[0])
        output = _length_table(_histogram_quantiles, marginals.histogram("output"), means[1])
        correlation = marginals.rank_correlation if correlation is None else correlation
    rank = rng.integers(0, QUANTILES, size // samples, dtype=np.uint16).repeat(samples)
    if correlation:
        # Pearson's correlation of two normals with the given Spearman correlation
        pearson = 2 * np.sin(np.pi * correlation / 6)
        noise = np.sqrt(1 - pearson**2) * rng.standard_normal(size)
        level = ndtr(pearson * _normal_quantiles()[rank] + noise)
        return prompt[rank], output.take((QUANTILES * level).astype(np.int32), mode="clip")
    return prompt[rank], output[rng.integers(0, QUANTILES, size, dtype=np.uint16)]


@cache
def _levels() -> Floats:
    return (np.arange(QUANTILES) + 0.5) / QUANTILES


@cache
def _normal_quantiles() -> Floats:
    return np.asarray(ndtri(_levels()))


def _lognormal_quantiles(cv: float) -> Floats:
    return np.asarray(np.exp(np.sqrt(np.log1p(cv**2)) * _normal_quantiles()))


def _histogram_quantiles(edges: Sequence[float], counts: Sequence[float]) -> Floats:
    cumulative = np.concatenate(([0.0], np.cumsum(counts))) / np.sum(counts)
    return np.interp(_levels(), cumulative, edges)


@lru_cache(maxsize=64)
def _length_table(
    quantiles: Callable[..., Floats], shape: tuple[float | Sequence[float], ...], mean: float
) -> Ints:
    """Return a table of lengths in whole tokens, at least one, of the given mean."""
    lengths = quantiles(*shape)

    def whole(scale: float) -> Floats:
        return np.clip(np.rint(scale * lengths), 1, LONGEST_TOKENS)

    # rounding and the floor shift the mean a little, so the scale is found rather than divided
    low, high = 0.0, 2 * mean / float(lengths.mean())
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if whole(middle).mean() < mean else (low, middle)
    return whole(high).astype(np.int32)
