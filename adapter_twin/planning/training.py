"""Train the interpretable models on a sweep, and keep them where anyone can check them.

Models are stored by skops: no code runs on loading but the types named here. Beside them lie what
they were chosen by (``comparison.csv``), a model card and the small trees as rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.model_selection import GroupKFold

from adapter_twin import __version__
from adapter_twin.datasets import replacing, write_table
from adapter_twin.errors import AdapterTwinError
from adapter_twin.planning.choice import Criterion
from adapter_twin.planning.labels import label
from adapter_twin.planning.surrogates import (
    FEATURES,
    FOLDS,
    MODELS,
    TARGETS,
    Split,
    chosen,
    compare,
    fit,
    make_model,
    split,
)
from adapter_twin.planning.trees import rules
from adapter_twin.strict import require

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.9

TRUSTED = (
    "adapter_twin.planning.surrogates._logarithms",
    "interpret.glassbox._ebm._ebm.ExplainableBoostingRegressor",
    "sklearn._loss._loss.CyHalfSquaredError",
    "sklearn._loss.link.Interval",
    "sklearn._loss.loss.HalfSquaredError",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
)
"""Types beyond skops' own list that our models are made of."""

SMALL_TREES = [name for name in MODELS if name.startswith("small tree")]

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """One stored model.

    Attributes
    ----------
    target, model, features : str
        See `adapter_twin.planning.surrogates`.
    interval_factor : float
        The true value lies within prediction / factor and prediction x factor, 9 times of 10.
    coverage : float
        Share of unseen workloads for which it did.
    estimator : estimator
    """

    target: str
    model: str
    features: str
    interval_factor: float
    coverage: float
    estimator: Any

    def predict(self, workloads: pd.DataFrame) -> tuple[Any, Any, Any]:
        """Return predictions, and the ends of their intervals, for rows of a table of workloads."""
        value = self.estimator.predict(FEATURES[self.features](workloads))
        return value, value / self.interval_factor, value * self.interval_factor


def train(
    runs: pd.DataFrame,
    out: Path,
    criterion: Criterion,
    *,
    models: Sequence[str] = tuple(MODELS),
    jobs: int = -1,
    tell: Tell = lambda done, total, text: None,
) -> pd.DataFrame:
    """Fit every model to the optima of a sweep, keep the best of each target, and describe it.

    Parameters
    ----------
    runs : pandas.DataFrame
        A sweep (`adapter_twin.planning.sweep.read_sweep`).
    out : pathlib.Path
        Gets a folder per language model.
    criterion : Criterion
        What makes a configuration the optimum.
    models : sequence of str
        Of `adapter_twin.planning.surrogates.MODELS`.
    jobs : int
        Processes; -1 is one per core.
    tell : callable

    Returns
    -------
    pandas.DataFrame
        The comparison (`adapter_twin.planning.surrogates.compare`), by language model.

    Raises
    ------
    AdapterTwinError
        Too few workloads to split.
    """
    import pandas as pd

    labels = label(runs, criterion)
    language_models = sorted(labels["model"].unique())
    tables = []
    for done, name in enumerate(language_models):
        tell(done, len(language_models), f"fitting to {name}")
        own = labels[labels["model"] == name]
        rates = own.loc[own.has_optimum, "rates_per_adapter"].nunique()
        require(
            rates >= 2 * FOLDS,
            f"{name}: {rates} mixes of rates have an optimum, {2 * FOLDS} are needed; sweep more",
        )
        parts = split(own)
        comparison = compare(parts, models, jobs=jobs)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        labelled = pd.concat([parts.train, parts.test])
        for _, row in chosen(comparison).iterrows():
            _store(_train_best(row, labelled), folder)
        _write_text(folder / "rules.txt", _small_trees(parts))
        _write_text(folder / "README.md", _card(name, comparison, parts, criterion))
        tables.append(comparison.assign(language_model=name))
    comparison = pd.concat(tables, ignore_index=True)
    write_table(comparison, out / "comparison.csv")
    tell(len(language_models), len(language_models), "done")
    return comparison


def _train_best(row: pd.Series[Any], labelled: pd.DataFrame) -> Trained:
    """Fit the chosen model to all workloads, and measure what its interval covers of unseen ones."""
    what = row.features, row.target, row.model
    return Trained(
        row.target,
        row.model,
        row.features,
        interval_factor(labelled, *what),
        coverage(labelled, *what),
        fit(labelled, *what),
    )


def coverage(labelled: pd.DataFrame, features: str, target: str, model: str) -> float:
    """Return the share of unseen workloads whose truth lies in the interval.

    Each fifth of the rates in turn is unseen by the model and by the width of its interval.
    """
    covered = np.zeros(len(labelled), bool)
    for seen, unseen in GroupKFold(FOLDS).split(labelled, groups=labelled.rates_per_adapter):
        train, test = labelled.iloc[seen], labelled.iloc[unseen]
        factor = interval_factor(train, features, target, model)
        predicted = fit(train, features, target, model).predict(FEATURES[features](test))
        ratio = np.abs(np.log(predicted / test[target].to_numpy(float)))
        covered[unseen] = ratio <= np.log(factor) + 1e-9  # a truth at the very end is inside
    return float(covered.mean())


def interval_factor(train: pd.DataFrame, features: str, target: str, model: str) -> float:
    """Return by what factor truth and prediction differ in at most a tenth of unseen workloads.

    Cross-conformal: absolute residuals of logarithms, each of a model that has not seen the
    workload's rates (Vovk 2015, as MAPIE implements it).
    """
    from mapie.regression import CrossConformalRegressor

    x, groups = FEATURES[features](train), train.rates_per_adapter
    conformal = CrossConformalRegressor(
        make_model(model).regressor,
        confidence_level=CONFIDENCE,
        method="base",
        cv=GroupKFold(FOLDS),
    ).fit_conformalize(x, np.log(train[target].to_numpy(float)), groups=groups)
    point, interval = conformal.predict_interval(x.iloc[:1])
    return float(np.exp(interval[0, 1, 0] - point[0]))


def _store(trained: Trained, folder: Path) -> None:
    import skops.io

    with replacing(folder / f"{trained.target}.skops") as temporary:
        skops.io.dump(trained.estimator, temporary)
    facts = {
        "model": trained.model,
        "features": trained.features,
        "interval_factor": trained.interval_factor,
        "coverage": trained.coverage,
        "version": __version__,
    }
    _write_text(folder / f"{trained.target}.json", json.dumps(facts, indent=1) + "\n")


def load_trained(folder: Path, target: str) -> Trained:
    """Load the model of one target.

    Raises
    ------
    AdapterTwinError
        There is none, or it is made of types that none of our models is made of.
    """
    import skops.io

    path = folder / f"{target}.skops"
    require(path.is_file(), f"{path}: no such model; run adapter-twin train first")
    foreign = sorted(set(skops.io.get_untrusted_types(file=path)) - set(TRUSTED))
    if foreign:
        raise AdapterTwinError(f"{path}: holds {foreign[0]}, which is no part of our models")
    facts = json.loads((folder / f"{target}.json").read_text(encoding="utf-8"))
    facts.pop("version")
    return Trained(target=target, estimator=skops.io.load(path, trusted=list(TRUSTED)), **facts)


def _small_trees(parts: Split) -> str:
    """Return the reference study's kind of tree for every target and depth, as rules."""
    texts = []
    for target in TARGETS:
        for model in SMALL_TREES:
            tree = fit(parts.train, "paper", target, model)
            names = list(FEATURES["paper"](parts.train.iloc[:1]).columns)
            texts.append(f"{target}, {model}\n{rules(tree.regressor_, names)}")
    return "\n".join(texts)


def _card(name: str, comparison: pd.DataFrame, parts: Split, criterion: Criterion) -> str:
    """Describe the models to whoever is about to use them."""
    best = chosen(comparison)
    table = "\n".join(
        f"| {row.target} | {row.model} | {row.features} | {row.cv_half_smape:.2f} | "
        f"{row.test_half_smape:.2f} | {row.test_mape:.2f} |"
        for row in best.itertuples()
    )
    return f"""# Surrogates of the optimum of {name}

**What they answer**: how many adapters, on how many slots, at which throughput, for a traffic mix.
The optimum: {criterion}.

**Trained on** {len(parts.train) + len(parts.test)} workloads of a sweep of the twin, none of them
measured. Chosen by cross-validation that leaves whole mixes of rates out; the test column
({len(parts.test)} workloads whose rates no fit had seen) was looked at afterwards. Halved SMAPE and
MAPE in percent.

| target | model | features | CV half-SMAPE | test half-SMAPE | test MAPE |
|---|---|---|---|---|---|
{table}

**Do not use them** outside the sweep's ranges of rates, ranks and lengths, on another GPU or
engine, or where a wrong answer starves a customer: `adapter-twin optimum` asks the twin itself.

Loading runs no code from the files beyond a fixed list of types (`load_trained`).
adapter-twin {__version__}.
"""


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
