"""Step time: one pass of the model over a batch with adapters.

The law is additive in what the step has to do: launch, tokens, sequences, KV tokens read, and the
adapter kernels. These launch a grid of (tiles of 32 tokens) x (slots): idle slots cost time per
tile, active adapters also per tile and per rank. Coefficients change where the kernels switch
tiling (128 tokens on vLLM 0.8.5) and where the batch leaves the CUDA graphs (512 tokens). How much
of this structure the data supports is decided by cross-validation over whole workloads.

A CPU has no such kernels: it gathers each token's adapter at the padded rank, so there the cost
follows tokens x ``max_lora_rank`` as soon as a batch holds an adapter at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from adapter_twin.errors import require
from adapter_twin.laws.estimator import Estimator, Fitted, NotBelow0
from adapter_twin.workload.strict import NotNegative, Whole, keys

Floats = NDArray[np.float64]

FEATURES = (
    *("launch", "tokens", "decodes", "context_tokens", "adapters", "adapters_tiles", "tiles"),
    "adapted",  # one if the batch holds an adapter
    "adapted_tokens",  # all its tokens then
)
"""A step does these, in the order of the compiled law (`adapter_twin.twin.clock.StepLaw`)."""

TILE = 32
"""A tile of vLLM's adapter kernels has this many tokens."""

Term = tuple[str, str]
"""A feature and its factor: "1", "L" (adapters or none), "G" (slots), "R" (rank) or "GR"."""

_COMMON: tuple[Term, ...] = (
    *(("launch", "1"), ("launch", "G"), ("launch", "GR"), ("tokens", "1")),
    *(("decodes", "1"), ("context_tokens", "1"), ("adapters", "1"), ("adapters", "R")),
)
_TILED: tuple[Term, ...] = (("adapters_tiles", "1"), ("tiles", "G"), ("tiles", "GR"))
_ADAPTED: tuple[Term, ...] = (*_COMMON, *_TILED, ("tokens", "L"))
_GATHERED: tuple[Term, ...] = (
    *(("launch", "1"), ("tokens", "1"), ("decodes", "1"), ("context_tokens", "1")),
    *(("adapters", "1"), ("adapted", "1"), ("adapted_tokens", "1"), ("adapted_tokens", "R")),
)

SWITCHES_TILING, LEAVES_GRAPHS = 128.0, 512.0
"""Past this many tokens in a batch vLLM 0.8.5's adapter kernels and its CUDA graphs change."""

FORMS: dict[str, tuple[tuple[float, ...], tuple[Term, ...]]] = {
    "additive": ((), _COMMON),
    "regimes": ((SWITCHES_TILING, LEAVES_GRAPHS), _COMMON),
    "tiles": ((SWITCHES_TILING, LEAVES_GRAPHS), _COMMON + _TILED),
    "tiles, long prefills apart": ((SWITCHES_TILING, LEAVES_GRAPHS, 1024.0), _COMMON + _TILED),
    "tiles and tokens of adapters": ((SWITCHES_TILING, LEAVES_GRAPHS, 1024.0), _ADAPTED),
    "the same, finer within the graphs": (
        (SWITCHES_TILING, 256.0, 384.0, LEAVES_GRAPHS, 1024.0),
        _ADAPTED,
    ),
    "tokens x padded rank": ((), _GATHERED),
    "tokens x padded rank, few tokens apart": ((32.0,), _GATHERED),
    "tokens x padded rank, few and many apart": ((32.0, 256.0), _GATHERED),
}
"""A candidate form has batch sizes past which its coefficients change, and terms per regime."""


@dataclass(frozen=True)
class StepObservations:
    """Measured step times, each with the distribution of the batches behind it.

    Attributes
    ----------
    step_ms : float64, shape (n,)
        Less scheduling and loading.
    waiting : float64, shape (n,)
        Requests waiting.
    batches : float64, shape (n, samples, features)
        Equally likely batches (`FEATURES`) that the observation averages over.
    slots, rank : float64, shape (n,)
    group : shape (n,)
        The workload, left out as a whole in cross-validation; empty for calibration runs.
    decides : bool, shape (n,)
        Whole runs: what the twin is to predict, so the form is chosen by their errors.
    weight : float64, shape (n,)
    """

    step_ms: Floats
    waiting: Floats
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


def batch_features(
    tokens: Floats, decodes: Floats, context_tokens: Floats, adapters: Floats
) -> Floats:
    """Return `FEATURES` of batches along a new last axis.

    Parameters
    ----------
    tokens, decodes, context_tokens, adapters : float64, of shapes that broadcast
        Tokens and decoding requests in the batch, KV tokens read, distinct adapters.
    """
    tiles, adapted = np.ceil(tokens / TILE), np.asarray(adapters) > 0
    work = (1.0, tokens, decodes, context_tokens, adapters, adapters * tiles, tiles)
    return np.stack(np.broadcast_arrays(*work, adapted, adapted * tokens), axis=-1)


def multipliers(max_loras: int, max_lora_rank: int) -> dict[str, int]:
    """Return the values of the factors of `Term` for an engine with adapters."""
    return {"1": 1, "L": 1, "G": max_loras, "R": max_lora_rank, "GR": max_loras * max_lora_rank}


def _one_of(names: Collection[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return name

    return AfterValidator(check)


@keys
class FittedTerm(TypedDict):
    """A coefficient of the law, with its 95 % interval."""

    regime: Whole
    feature: Annotated[str, _one_of(FEATURES)]
    multiplier: Annotated[str, _one_of(multipliers(0, 0))]
    ms: NotBelow0
    low_ms: Fitted
    high_ms: Fitted


class StepTimeLaw(Estimator):
    """Step time of one model on one GPU and engine version.

    Attributes
    ----------
    form_ : str
        The form chosen among `FORMS`.
    token_breaks_ : list of float
    terms_ : list of dict
        ``regime, feature, multiplier, ms, low_ms, high_ms``: the coefficients above zero, with 95 %
        intervals that are robust to correlation within a workload.
    waiting_ms_ : float
        What each waiting request costs the engine's process in a step, besides scheduling.
    cv_error_percent_ : dict
        MAPE of whole runs of left-out workloads, by form.
    """

    cv_error_percent_: dict[str, float]
    form_: str
    token_breaks_: list[NotNegative]
    waiting_ms_: NotBelow0
    terms_: Annotated[list[FittedTerm], Field(min_length=1)]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a fitted law; raise `AdapterTwinError` unless it is one."""
        law = super().from_dict(values)
        breaks = law.token_breaks_
        require(all(a < b for a, b in pairwise(breaks)), "token_breaks_: must increase")
        for i, term in enumerate(law.terms_):
            is_one = term["regime"] <= len(breaks)
            require(is_one, f"terms_[{i}].regime: must be at most {len(breaks)}, of token_breaks_")
        return law

    def fit(self, observed: StepObservations) -> StepTimeLaw:
        """Choose the form by leave-one-workload-out error, then fit it to everything."""
        self.cv_error_percent_ = {
            form: float(100 * np.abs(self.cv_errors(observed, form)[observed.decides]).mean())
            for form in FORMS
        }
        self.form_ = min(self.cv_error_percent_, key=self.cv_error_percent_.__getitem__)
        design, names = _design(observed, self.form_)
        values, weight = _solve(design, observed.step_ms, observed.weight)
        self.token_breaks_ = list(FORMS[self.form_][0])
        self.waiting_ms_ = float(values[-1])
        active = values > 0
        intervals = _intervals(design[:, active], observed, weight)
        kept = list(compress(zip(names, values, strict=False), active))
        self.terms_ = [
            FittedTerm(
                regime=regime,
                feature=feature,
                multiplier=factor,
                ms=float(value),
                low_ms=low,
                high_ms=high,
            )
            for ((regime, feature, factor), value), (low, high) in zip(
                kept, intervals, strict=False
            )
        ]
        return self

    @staticmethod
    def cv_errors(observed: StepObservations, form: str) -> Floats:
        """Return relative errors with each workload unseen by the fit; NaN for calibration runs."""
        design, _ = _design(observed, form)
        error = np.full(len(design), np.nan)
        for group in np.unique(observed.group[observed.group != ""]):
            left_out = observed.group == group
            values, _ = _solve(
                design[~left_out], observed.step_ms[~left_out], observed.weight[~left_out]
            )
            error[left_out] = design[left_out] @ values / observed.step_ms[left_out] - 1
        return error

    def for_engine(self, max_loras: int, max_lora_rank: int) -> Floats:
        """Return the coefficients in ms for an engine, shape (regimes, features)."""
        return self._coefficients(multipliers(max_loras, max_lora_rank))

    def without_adapters(self) -> Floats:
        """Return the coefficients in ms of an engine that launches no adapter kernels."""
        return self._coefficients({**multipliers(0, 0), "L": 0})

    def _coefficients(self, multiplier: dict[str, int]) -> Floats:
        coefficients: Floats = np.zeros((len(self.token_breaks_) + 1, len(FEATURES)))
        for term in self.terms_:
            column = FEATURES.index(term["feature"])
            coefficients[term["regime"], column] += term["ms"] * multiplier[term["multiplier"]]
        return coefficients

    def predict_ms(
        self, batches: Floats, max_loras: int, max_lora_rank: int, waiting: float = 0.0
    ) -> Floats:
        """Return step times in ms, less scheduling and loading.

        Parameters
        ----------
        batches : float64, shape (..., features)
            See `batch_features`.
        max_loras, max_lora_rank : int
        waiting : float
            Requests waiting.
        """
        regime = np.searchsorted(self.token_breaks_, batches[..., FEATURES.index("tokens")])
        coefficients = self.for_engine(max_loras, max_lora_rank)[regime]
        return np.asarray((batches * coefficients).sum(axis=-1) + self.waiting_ms_ * waiting)

    def expected_ms(self, observed: StepObservations) -> Floats:
        """Return the law's step times of observations in ms, shape (n,)."""
        rows = zip(observed.batches, observed.slots, observed.rank, observed.waiting, strict=True)
        return np.array(
            [
                self.predict_ms(batches, int(slots), int(rank), float(waiting)).mean()
                for batches, slots, rank, waiting in rows
            ]
        )


def _design(observed: StepObservations, form: str) -> tuple[Floats, list[tuple[int, str, str]]]:
    """Return the expected terms per observation, by regime and term; waiting requests last."""
    breaks, terms = FORMS[form]
    regime = np.searchsorted(breaks, observed.batches[..., FEATURES.index("tokens")])
    one, slots, rank = np.ones(len(regime)), observed.slots, observed.rank
    multiplier = {"1": one, "L": slots > 0, "G": slots, "R": rank, "GR": slots * rank}
    columns, names = [], []
    for g in range(len(breaks) + 1):
        expected = (observed.batches * (regime == g)[..., None]).mean(axis=1)
        for feature, factor in terms:
            columns.append(expected[:, FEATURES.index(feature)] * multiplier[factor])
            names.append((g, feature, factor))
    return np.column_stack([*columns, observed.waiting]), names


def _solve(design: Floats, step_ms: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Solve for relative errors, non-negative, robust to outliers (Huber); also return weights."""
    from scipy.optimize import nnls

    scale = np.abs(design).max(axis=0) + 1e-12
    relative = np.sqrt(weight) / step_ms
    robust = np.ones(len(step_ms))
    for _ in range(3):
        row = relative * robust
        values = nnls(design / scale * row[:, None], step_ms * row, maxiter=1000)[0] / scale
        error = np.abs(design @ values / step_ms - 1)
        robust = np.sqrt(np.minimum(1, 3 * np.median(error) / np.maximum(error, 1e-9)))
    return values, (relative * robust) ** 2


def _intervals(design: Floats, observed: StepObservations, weight: Floats) -> list[list[float]]:
    """Return 95 % intervals of the coefficients, clustered by workload."""
    import statsmodels.api as sm

    clusters = np.unique(observed.group, return_inverse=True)[1]
    fit = sm.WLS(observed.step_ms, design, weights=weight)
    clustered = fit.fit(cov_type="cluster", cov_kwds={"groups": clusters})
    intervals: list[list[float]] = clustered.conf_int().tolist()
    return intervals
