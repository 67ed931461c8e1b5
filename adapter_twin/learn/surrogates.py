"""Interpretable models of the optimum, and of starvation: fitted to a sweep, judged by workload.

Workloads that share their rates are never split: they differ in ranks only, and one of them would
give the others away. The last folds of the rates are a test set that no choice has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.model_selection import GroupKFold, GroupShuffleSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, SplineTransformer, StandardScaler
from sklearn.tree import DecisionTreeRegressor

from adapter_twin.learn.features import paper_features, traffic_features
from adapter_twin.service.metrics import half_smape, mape

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

TARGETS = ("served_adapters", "adapter_slots", "total_throughput")
"""The optimum: N*, G*, and the throughput there in tokens/s."""

FEATURES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "paper": paper_features,
    "traffic": traffic_features,
}
"""Sets of features, by name."""


def feature_array(features: str, workloads: pd.DataFrame) -> Floats:
    """Return a set of `FEATURES` as an array, a row per workload."""
    return FEATURES[features](workloads).to_numpy(float)


YARDSTICKS = ("random forest", "gradient boosting")
"""Compared to tell what it costs to be interpretable; never chosen."""

FOLDS = 5
TEST_SHARE = 0.2


def logarithms(values: Any) -> Any:
    """Positive features act through their logarithm, which also tames zeros."""
    return np.log(np.asarray(values, dtype=float) + 1e-3)


def linear(model: Any) -> Any:
    """Return a linear model of standardised logarithms."""
    return make_pipeline(FunctionTransformer(logarithms), StandardScaler(), model)


def _bent(model: Any) -> Any:
    """Let each feature act along a line with bends: optima stop growing at the grid's edges."""
    return make_pipeline(SplineTransformer(n_knots=8, degree=1), model)


BOOSTING = {
    "interactions": 4,
    "outer_bags": 1,
    "max_rounds": 300,
    "learning_rate": 0.05,
    "n_jobs": 1,
    "random_state": 0,
}
"""Of explainable boosting machines."""


def _boosted_gam() -> Any:
    from interpret.glassbox import ExplainableBoostingRegressor

    return ExplainableBoostingRegressor(**BOOSTING)


MODELS: dict[str, Callable[[], Any]] = {
    "linear": lambda: linear(LinearRegression()),
    "ridge": lambda: linear(RidgeCV(np.logspace(-3, 3, 13))),
    "piecewise linear": lambda: linear(_bent(RidgeCV(np.logspace(-3, 3, 13)))),
    "small tree, depth 2": lambda: DecisionTreeRegressor(max_depth=2, random_state=0),
    "small tree, depth 4": lambda: DecisionTreeRegressor(max_depth=4, random_state=0),
    "small tree, depth 6": lambda: DecisionTreeRegressor(max_depth=6, random_state=0),
    "decision tree": lambda: DecisionTreeRegressor(min_samples_leaf=3, random_state=0),
    "random forest": lambda: RandomForestRegressor(200, min_samples_leaf=2, random_state=0),
    "gradient boosting": lambda: HistGradientBoostingRegressor(max_iter=200, random_state=0),
    "explainable boosting": _boosted_gam,
}
"""The models that are compared, by name, simplest first."""


def make_model(name: str) -> Any:
    """Return an unfitted model of `MODELS`.

    It learns the logarithm of its target: errors count relatively, and no prediction is negative.
    """
    return TransformedTargetRegressor(MODELS[name](), func=np.log, inverse_func=np.exp)


@dataclass(frozen=True, slots=True)
class Split:
    """Workloads of one model, or runs of them, split by their rates."""

    train: pd.DataFrame
    test: pd.DataFrame


def split(table: pd.DataFrame, seed: int = 0) -> Split:
    """Set a fifth of the rates apart, with all their rows."""
    shuffle = GroupShuffleSplit(1, test_size=TEST_SHARE, random_state=seed)
    train, test = next(shuffle.split(table, groups=table.rates_per_adapter))
    return Split(table.iloc[train], table.iloc[test])


def cross_validate(train: pd.DataFrame, features: str, target: str, model: str) -> Floats:
    """Return predictions for every workload by a model that has not seen its rates."""
    return np.asarray(
        cross_val_predict(
            make_model(model),
            feature_array(features, train),
            train[target],
            groups=train.rates_per_adapter,
            cv=GroupKFold(FOLDS),
        )
    )


def compare(parts: Split, models: Sequence[str] = tuple(MODELS), *, jobs: int = -1) -> pd.DataFrame:
    """Return the errors of every model, set of features and target, cross-validated and on test.

    Returns
    -------
    pandas.DataFrame
        ``target, features, model``; ``cv_half_smape`` and ``cv_mape`` of workloads left out in
        training, which models are chosen by; ``test_half_smape``, ``test_mape``; in percent.
    """
    import pandas as pd

    tasks = (
        joblib.delayed(_errors)(parts, target, features, model)
        for target, features, model in product(TARGETS, FEATURES, models)
    )
    return pd.DataFrame(joblib.Parallel(jobs)(tasks))


def _errors(parts: Split, target: str, features: str, model: str) -> dict[str, Any]:
    left_out = cross_validate(parts.train, features, target, model)
    unseen = fit(parts.train, features, target, model).predict(feature_array(features, parts.test))
    return {
        "target": target,
        "features": features,
        "model": model,
        "cv_half_smape": half_smape(parts.train[target], left_out),
        "cv_mape": mape(parts.train[target], left_out),
        "test_half_smape": half_smape(parts.test[target], unseen),
        "test_mape": mape(parts.test[target], unseen),
    }


def chosen(comparison: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the interpretable model with the lowest cross-validated error, by target.

    ``comparison`` may hold several language models, told apart by ``language_model``.
    """
    own = comparison[~comparison.model.isin(YARDSTICKS)]
    by = [name for name in ("language_model", "target") if name in own]
    return own.loc[own.groupby(by, sort=False).cv_half_smape.idxmin()]


def fit(train: pd.DataFrame, features: str, target: str, model: str) -> Any:
    """Fit one model to labelled workloads."""
    return clone(make_model(model)).fit(feature_array(features, train), train[target])


def to_grid(values: Floats, grid: Iterable[int]) -> NDArray[np.int64]:
    """Round predictions of N or G to the nearest number of a grid, by ratio."""
    steps = np.array(sorted(grid))
    distance = np.abs(np.log(np.asarray(values)[:, None]) - np.log(steps))
    return np.asarray(steps[distance.argmin(axis=1)])
