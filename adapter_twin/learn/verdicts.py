"""Classifiers of configurations: N adapters on G slots will be served, or starve.

They are fitted to the runs that the sweep had to simulate; what starts but is hopeless, or does not
start at all, is told without them. Workloads that share their rates are never split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.tree import DecisionTreeClassifier

from adapter_twin.learn.features import configuration_features
from adapter_twin.learn.surrogates import BOOSTING, FOLDS, YARDSTICKS, Split, linear
from adapter_twin.plan.criterion import TIE, Criterion

if TYPE_CHECKING:
    import pandas as pd


def _boosted_gam() -> Any:
    from interpret.glassbox import ExplainableBoostingClassifier

    return ExplainableBoostingClassifier(**BOOSTING)


CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "logistic regression": lambda: linear(LogisticRegression(C=100.0, max_iter=2000)),
    "small tree, depth 2": lambda: DecisionTreeClassifier(max_depth=2, random_state=0),
    "small tree, depth 4": lambda: DecisionTreeClassifier(max_depth=4, random_state=0),
    "small tree, depth 6": lambda: DecisionTreeClassifier(max_depth=6, random_state=0),
    "decision tree": lambda: DecisionTreeClassifier(min_samples_leaf=3, random_state=0),
    "random forest": lambda: RandomForestClassifier(200, min_samples_leaf=2, random_state=0),
    "gradient boosting": lambda: HistGradientBoostingClassifier(max_iter=200, random_state=0),
    "explainable boosting": _boosted_gam,
}
"""The classifiers that are compared, by name, simplest first."""


def verdicts(runs: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Return the simulated runs of a sweep with ``serves``: the criterion's verdict."""
    simulated = runs[runs.simulated]
    return simulated.assign(serves=criterion.feasible(simulated)).reset_index(drop=True)


def fit_classifier(train: pd.DataFrame, name: str) -> Any:
    """Fit one of `CLASSIFIERS` to runs with a verdict."""
    return clone(CLASSIFIERS[name]()).fit(configuration_features(train).to_numpy(), train.serves)


def compare_classifiers(
    parts: Split, names: tuple[str, ...] = tuple(CLASSIFIERS), *, jobs: int = -1
) -> pd.DataFrame:
    """Return the errors of every classifier, cross-validated and on test.

    Returns
    -------
    pandas.DataFrame
        ``model``; ``cv_macro_f1`` of runs left out in training, which a classifier is chosen by;
        ``test_macro_f1``; of the test runs, in percent, ``served_wrongly`` (said to be served, but
        starve) and ``starved_wrongly``.
    """
    import pandas as pd

    tasks = (joblib.delayed(_errors)(parts, name) for name in names)
    return pd.DataFrame(joblib.Parallel(jobs)(tasks))


def _errors(parts: Split, name: str) -> dict[str, Any]:
    train, test = parts.train, parts.test
    left_out = cross_val_predict(
        CLASSIFIERS[name](),
        configuration_features(train).to_numpy(),
        train.serves,
        groups=train.rates_per_adapter,
        cv=GroupKFold(FOLDS),
    )
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


def pick(runs: pd.DataFrame, classifier: Any, within: list[str]) -> pd.DataFrame:
    """Return the configuration of each workload that a classifier would choose.

    What is served has the throughput that is offered, so the most offered load that is served wins;
    among ties, the configuration that is surest to be served.

    Parameters
    ----------
    runs : pandas.DataFrame
        Configurations that start; as for `configuration_features`, and ``offered_tokens_per_s``.
    classifier : estimator
        See `fit_classifier`.
    within : list of str
        Columns that tell the workloads apart.

    Returns
    -------
    pandas.DataFrame
        Rows of `runs`, one per workload of which anything is served, with ``total_throughput``.
    """
    served = classifier.predict_proba(configuration_features(runs).to_numpy())[:, 1]
    good = runs.assign(sure=served, total_throughput=runs.offered_tokens_per_s).query("sure > 0.5")
    most = good.groupby(within, observed=True).total_throughput.transform("max")
    tied = good[good.total_throughput >= (1 - TIE) * most]
    return tied.sort_values("sure", ascending=False).drop_duplicates(within).drop(columns="sure")
