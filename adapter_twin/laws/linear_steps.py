"""A step-time law as a sum of fitted terms, for machines whose kernels are not modelled.

A CPU has no adapter kernels: it gathers each token's adapter at the padded rank, so there the cost
follows tokens x ``max_lora_rank`` as soon as a batch holds an adapter at all. How much structure
the data supports is decided by cross-validation over whole groups of observations.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import compress, pairwise
from typing import Annotated, Any, Self

import numpy as np
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from adapter_twin.errors import require
from adapter_twin.laws.estimator import Fitted, NotBelow0
from adapter_twin.laws.step_time import FEATURES, Floats, Number, StepObservations, StepTimeLaw
from adapter_twin.workload.strict import NotNegative, Whole, keys

Term = tuple[str, str]
"""A feature and its factor: "1", "G" (slots), "R" (rank) or "GR"."""

_BASE: tuple[Term, ...] = (("launch", "1"), ("tokens", "1"), ("decodes", "1"))
_ADDITIVE: tuple[Term, ...] = (
    *(*_BASE, ("context_tokens", "1"), ("launch", "G"), ("launch", "GR")),
    *(("adapters", "1"), ("adapters", "R")),
)
_GATHERED: tuple[Term, ...] = (
    *(*_BASE, ("context_tokens", "1"), ("adapters", "1")),
    *(("adapted", "1"), ("adapted_tokens", "1"), ("adapted_tokens", "R")),
)

FORMS: dict[str, tuple[tuple[float, ...], tuple[Term, ...]]] = {
    "additive": ((), _ADDITIVE),
    "tokens x padded rank": ((), _GATHERED),
    "tokens x padded rank, few tokens apart": ((32.0,), _GATHERED),
    "tokens x padded rank, few and many apart": ((32.0, 256.0), _GATHERED),
}
"""A candidate form has batch sizes past which its coefficients change, and terms per regime."""


def multipliers(max_loras: Number, max_lora_rank: Number) -> dict[str, Number]:
    """Return the values of the factors of `Term` for an engine."""
    return {"1": 1, "G": max_loras, "R": max_lora_rank, "GR": max_loras * max_lora_rank}


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


class LinearStepLaw(StepTimeLaw):
    """Step time as a sum of terms, whose coefficients change with the batch size.

    Attributes
    ----------
    form_ : str
        The form chosen among `FORMS`.
    token_breaks_ : list of float
    terms_ : list of dict
        ``regime, feature, multiplier, ms, low_ms, high_ms``: the coefficients above zero, with 95 %
        intervals that are robust to correlation within a workload.
    cv_error_percent_ : dict
        MAPE of whole runs of left-out workloads, by form.
    """

    cv_error_percent_: dict[str, float]
    form_: str
    token_breaks_: list[NotNegative]
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

    def fit(self, observed: StepObservations) -> LinearStepLaw:
        """Choose the form by leave-one-workload-out error, then fit it to everything."""
        self.cv_error_percent_ = {
            form: float(100 * np.abs(self.cv_errors(observed, form)[observed.decides]).mean())
            for form in FORMS
        }
        self.form_ = min(self.cv_error_percent_, key=self.cv_error_percent_.__getitem__)
        design, names = _design(observed, self.form_)
        values, weight = _solve(design, observed.step_ms, observed.weight)
        self.token_breaks_ = list(FORMS[self.form_][0])
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

    def for_engine(self, max_loras: Number, max_lora_rank: Number) -> Floats:
        """Return the coefficients in ms for an engine, or for each of several."""
        multiplier = multipliers(max_loras, max_lora_rank)
        engines = np.shape(multiplier["GR"])
        coefficients = np.zeros((*engines, len(self.token_breaks_) + 1, len(FEATURES)))
        for term in self.terms_:
            column = FEATURES.index(term["feature"])
            coefficients[..., term["regime"], column] += term["ms"] * multiplier[term["multiplier"]]
        return coefficients


def _design(observed: StepObservations, form: str) -> tuple[Floats, list[tuple[int, str, str]]]:
    """Return the expected terms per observation, by regime and term."""
    breaks, terms = FORMS[form]
    regime = np.searchsorted(breaks, observed.batches[..., FEATURES.index("tokens")])
    one, slots, rank = np.ones(len(regime)), observed.slots, observed.rank
    multiplier = {"1": one, "G": slots, "R": rank, "GR": slots * rank}
    columns, names = [], []
    for g in range(len(breaks) + 1):
        expected = (observed.batches * (regime == g)[..., None]).mean(axis=1)
        for feature, factor in terms:
            columns.append(expected[:, FEATURES.index(feature)] * multiplier[factor])
            names.append((g, feature, factor))
    return np.column_stack(columns), names


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
