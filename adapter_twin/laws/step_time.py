"""Step time: one pass of the model over a batch with adapters.

Every law of it compiles to coefficients that are constant between some batch sizes: an amount of
time for each of `FEATURES`. That is what the twin's loop reads
(`adapter_twin.twin.clock.StepLaw`) and the analytic model averages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adapter_twin.laws.estimator import Estimator

Floats = NDArray[np.float64]
Number = int | Floats

FEATURES = (
    *("launch", "tokens", "decodes", "context_tokens", "adapters", "adapters_tokens"),
    "adapted",  # one if the batch holds an adapter
    "adapted_tokens",  # all its tokens then
)
"""A step does these, in the order of the compiled law."""


@dataclass(frozen=True)
class StepObservations:
    """Measured step times, each with the distribution of the batches behind it.

    Attributes
    ----------
    step_ms : float64, shape (n,)
        Less scheduling and loading.
    arrivals_per_s : float64, shape (n,)
        Requests that reached the engine.
    batches : float64, shape (n, samples, features)
        Equally likely batches (`FEATURES`) that the observation averages over.
    slots, rank : float64, shape (n,)
    group : shape (n,)
        The workload, left out as a whole in cross-validation; empty for calibration runs.
    decides : bool, shape (n,)
        Whole runs: what the twin is to predict, so a form is chosen by their errors.
    weight : float64, shape (n,)
    """

    step_ms: Floats
    arrivals_per_s: Floats
    batches: Floats
    slots: Floats
    rank: Floats
    group: NDArray[np.str_]
    decides: NDArray[np.bool_]
    weight: Floats

    @classmethod
    def concatenate(cls, parts: Sequence[StepObservations]) -> StepObservations:
        """Join observations; those of single batches are repeated to the others' sample size."""
        samples = max(part.batches.shape[1] for part in parts)
        repeated = [
            replace(p, batches=np.repeat(p.batches, samples // p.batches.shape[1], axis=1))
            for p in parts
        ]
        return cls(
            *(np.concatenate(c) for c in zip(*(vars(p).values() for p in repeated), strict=True))
        )

    def means_by_regime(self, token_breaks: Sequence[float]) -> Floats:
        """Return the mean features in each range of batch sizes, shape (n, regimes, features).

        Parameters
        ----------
        token_breaks : sequence of float
            The ranges end with these numbers of tokens.
        """
        n, samples, features = self.batches.shape
        regimes = len(token_breaks) + 1
        regime = np.searchsorted(token_breaks, self.batches[..., FEATURES.index("tokens")])
        place = (regimes * np.arange(n)[:, None] + regime).ravel()
        total = [
            np.bincount(place, self.batches[..., f].ravel(), n * regimes) for f in range(features)
        ]
        means: Floats = np.stack(total, axis=-1).reshape(n, regimes, features) / samples
        return means


def batch_features(
    tokens: Floats, decodes: Floats, context_tokens: Floats, adapters: Floats
) -> Floats:
    """Return `FEATURES` of batches along a new last axis.

    Parameters
    ----------
    tokens, decodes, context_tokens, adapters : float64, of shapes that broadcast
        Tokens and decoding requests in the batch, KV tokens read, distinct adapters.
    """
    adapted = np.asarray(adapters) > 0
    work = (1.0, tokens, decodes, context_tokens, adapters, adapters * tokens)
    return np.stack(np.broadcast_arrays(*work, adapted, adapted * tokens), axis=-1)


class StepTimeLaw(Estimator):
    """Step time of one model on one machine and engine version.

    Attributes
    ----------
    token_breaks_ : sequence of float
        The coefficients change past these batch sizes.
    """

    if TYPE_CHECKING:
        token_breaks_: Sequence[float]

    @property
    def arrival_ms(self) -> float:
        """What a request costs the engine's process when it arrives."""
        return 0.0

    @abstractmethod
    def for_engine(self, max_loras: Number, max_lora_rank: Number) -> Floats:
        """Return the coefficients in ms for an engine, or for each of several.

        Parameters
        ----------
        max_loras, max_lora_rank : int, or float64 of shape (n,)
            Of an engine with no slots, which launches no adapter kernels, the rank is nothing.

        Returns
        -------
        float64, shape (regimes, features) or (n, regimes, features)
        """

    def expected_ms(self, observed: StepObservations, work: Floats | None = None) -> Floats:
        """Return the law's step times of observations in ms, shape (n,).

        Parameters
        ----------
        observed : StepObservations
        work : float64, optional
            Their `means_by_regime`, where these are known.
        """
        if work is None:
            work = observed.means_by_regime(self.token_breaks_)
        step_ms = np.einsum("nrf,nrf->n", work, self.for_engine(observed.slots, observed.rank))
        # While a step runs, requests arrive, whose time is part of it.
        return np.asarray(step_ms / (1 - self.arrival_ms * observed.arrivals_per_s / 1e3))
