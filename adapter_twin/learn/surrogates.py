"""Interpretable models of the optimum, and classifiers of configurations: served, or starving.

The former are fitted to the optima of a sweep. The latter are fitted to the runs that it had to
simulate; what starts but is hopeless, or does not start at all, is told without them. Workloads
that share their rates are never split: they differ in ranks only, and one of them would give the
others away. A fifth of the rates is a test set that no choice has seen.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, GroupShuffleSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, SplineTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from adapter_twin.learn.features import configuration_features, paper_features, traffic_features
from adapter_twin.parallel import share_out
from adapter_twin.plan.criterion import Criterion
from adapter_twin.service.metrics import half_smape, mape
from adapter_twin.workload.lengths import Floats

TARGETS = ("served_adapters", "adapter_slots", "total_throughput")
"""The models predict these of an optimum: N*, G*, and the throughput there in tokens/s."""

FEATURES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "paper": paper_features,
    "traffic": traffic_features,
}
"""A model sees one of these sets of features."""


def feature_array(features: str, workloads: pd.DataFrame) -> Floats:
    """Return a set of `FEATURES` as an array, a row per workload."""
    return FEATURES[features](workloads).to_numpy(float)


YARDSTICKS = ("random forest", "gradient boosting")
"""These models are compared to tell what it costs to be interpretable; they are never chosen."""

FOLDS = 5
TEST_SHARE = 0.2


def logarithms(values: Any) -> Any:
    """Positive features act through their logarithm, which also tames zeros."""
    return np.log(np.asarray(values, dtype=float) + 1e-3)


def linear(model: Any) -> Any:
    """Return a linear model of standardised logarithms."""
    return make_pipeline(FunctionTransformer(logarithms), StandardScaler(), model)


BOOSTING = {
    "interactions": 4,
    "outer_bags": 1,
    "max_rounds": 300,
    "learning_rate": 0.05,
    "n_jobs": 1,
    "random_state": 0,
}
"""Explainable boosting machines have these options."""


def _boosted_gam(kind: str) -> Any:
    from interpret import glassbox

    return getattr(glassbox, kind)(**BOOSTING)


def _trees(tree: Any, forest: Any, boosting: Any, gam: str) -> dict[str, Callable[[], Any]]:
    """Return the tree-based models of one kind, regressors or classifiers."""
    small = {
        f"small tree, depth {d}": partial(tree, max_depth=d, random_state=0) for d in (2, 4, 6)
    }
    return {
        **small,
        "decision tree": partial(tree, min_samples_leaf=3, random_state=0),
        "random forest": partial(forest, 200, min_samples_leaf=2, random_state=0),
        "gradient boosting": partial(boosting, max_iter=200, random_state=0),
        "explainable boosting": partial(_boosted_gam, gam),
    }


MODELS: dict[str, Callable[[], Any]] = {
    "linear": lambda: linear(LinearRegression()),
    "ridge": lambda: linear(RidgeCV(np.logspace(-3, 3, 13))),
    # Each feature acts along a line with bends: optima stop growing at the grid's edges.
    "piecewise linear": lambda: linear(
        make_pipeline(SplineTransformer(n_knots=8, degree=1), RidgeCV(np.logspace(-3, 3, 13)))
    ),
    **_trees(
        DecisionTreeRegressor,
        RandomForestRegressor,
        HistGradientBoostingRegressor,
        "ExplainableBoostingRegressor",
    ),
}
"""The models of the optimum that are compared, by name, simplest first."""

CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "logistic regression": lambda: linear(LogisticRegression(C=100.0, max_iter=2000)),
    **_trees(
        DecisionTreeClassifier,
        RandomForestClassifier,
        HistGradientBoostingClassifier,
        "ExplainableBoostingClassifier",
    ),
}
"""The classifiers of configurations that are compared, by name, simplest first."""


def make_model(name: str) -> Any:
    """Return an unfitted model of `MODELS`.

    It learns the logarithm of its target: errors count relatively, and no prediction is negative.
    """
    return TransformedTargetRegressor(MODELS[name](), func=np.log, inverse_func=np.exp)


class Split(NamedTuple):
    """Workloads of one model, or runs of them, split by their rates."""

    train: pd.DataFrame
    test: pd.DataFrame


def split(table: pd.DataFrame, seed: int = 0) -> Split:
    """Set a fifth of the rates apart, with all their rows."""
    shuffle = GroupShuffleSplit(1, test_size=TEST_SHARE, random_state=seed)
    train, test = next(shuffle.split(table, groups=table.rates_per_adapter))
    return Split(table.iloc[train], table.iloc[test])


def _left_out(model: Any, seen: Floats, train: pd.DataFrame, target: str) -> Floats:
    """Return what a model predicts for each row from what it has learnt without the row's rates."""
    folds = GroupKFold(FOLDS)
    groups = train.rates_per_adapter
    return np.asarray(cross_val_predict(model, seen, train[target], groups=groups, cv=folds))


def cross_validate(train: pd.DataFrame, features: str, target: str, model: str) -> Floats:
    """Return predictions for every workload by a model that has not seen its rates.

    Parameters
    ----------
    train, features, target, model
        As for `fit`.
    """
    return _left_out(make_model(model), feature_array(features, train), train, target)


def compare(parts: Split, models: Sequence[str] = tuple(MODELS), *, jobs: int = -1) -> pd.DataFrame:
    """Return the errors of every model, set of features and target, cross-validated and on test.

    Parameters
    ----------
    parts : Split
        Of labelled workloads.
    models : sequence of str
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    pandas.DataFrame
        ``target, features, model``; ``cv_half_smape`` and ``cv_mape`` of workloads left out in
        training, which models are chosen by; ``test_half_smape``, ``test_mape``; in percent.
    """
    tasks = (
        joblib.delayed(_errors)(parts, target, features, model)
        for target, features, model in product(TARGETS, FEATURES, models)
    )
    return pd.DataFrame(share_out(tasks, jobs))


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
    """Fit one model to labelled workloads.

    Parameters
    ----------
    train : pandas.DataFrame
        Workloads with their optima, see `adapter_twin.learn.sweep.label`.
    features, target, model : str
        Of `FEATURES`, `TARGETS` and `MODELS`.
    """
    return make_model(model).fit(feature_array(features, train), train[target])


def to_grid(values: Floats, grid: Iterable[int]) -> NDArray[np.int64]:
    """Round predictions of N or G to the nearest number of a grid, by ratio."""
    steps = np.array(sorted(grid))
    distance = np.abs(np.log(np.asarray(values)[:, None]) - np.log(steps))
    return np.asarray(steps[distance.argmin(axis=1)])


def verdicts(runs: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Return the simulated runs of a sweep with ``serves``: the criterion's verdict."""
    simulated = runs[runs.simulated]
    return simulated.assign(serves=criterion.feasible(simulated)).reset_index(drop=True)


def fit_classifier(train: pd.DataFrame, name: str) -> Any:
    """Fit one of `CLASSIFIERS` to runs with a verdict."""
    return CLASSIFIERS[name]().fit(configuration_features(train).to_numpy(), train.serves)


def compare_classifiers(
    parts: Split, names: tuple[str, ...] = tuple(CLASSIFIERS), *, jobs: int = -1
) -> pd.DataFrame:
    """Return the errors of every classifier, cross-validated and on test.

    Parameters
    ----------
    parts : Split
        Of `verdicts`.
    names : tuple of str
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    pandas.DataFrame
        ``model``; ``cv_macro_f1`` of runs left out in training, which a classifier is chosen by;
        ``test_macro_f1``; of the test runs, in percent, ``served_wrongly`` (said to be served, but
        starve) and ``starved_wrongly``.
    """
    tasks = (joblib.delayed(_verdict_errors)(parts, name) for name in names)
    return pd.DataFrame(share_out(tasks, jobs))


def _verdict_errors(parts: Split, name: str) -> dict[str, Any]:
    train, test = parts.train, parts.test
    seen = configuration_features(train).to_numpy()
    left_out = _left_out(CLASSIFIERS[name](), seen, train, "serves")
    unseen = fit_classifier(train, name).predict(configuration_features(test).to_numpy())
    truth = test.serves.to_numpy()
    return {
        "model": name,
        "cv_macro_f1": f1_score(train.serves, left_out, average="macro"),
        "test_macro_f1": f1_score(truth, unseen, average="macro"),
        "served_wrongly": 100 * float(np.mean(unseen & ~truth)),
        "starved_wrongly": 100 * float(np.mean(~unseen & truth)),
    }


def chosen_classifier(comparison: pd.DataFrame) -> str:
    """Return the interpretable classifier with the highest cross-validated macro-F1."""
    own = comparison[~comparison.model.isin(YARDSTICKS)]
    return str(own.set_index("model").cv_macro_f1.idxmax())
