"""Training of the interpretable models on a sweep; beside them lie their errors, card and rules."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mapie.regression import CrossConformalRegressor
from sklearn.model_selection import GroupKFold

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.learn import surrogates
from adapter_twin.learn.stored import About, Trained, store, store_estimator
from adapter_twin.learn.surrogates import FEATURES, FOLDS, MODELS, TARGETS, feature_array, fit
from adapter_twin.learn.sweep import label
from adapter_twin.plan.criterion import Criterion
from adapter_twin.tables.datasets import write_table, write_text

CONFIDENCE = 0.9
"""An interval holds this share of the unseen workloads."""

FEWEST_RATES = 3 * FOLDS
"""A 90 % interval needs more than ten mixes of rates, with a fifth left out."""

LEAF = -1
"""scikit-learn marks a node without children by this number."""

MERGED_WITHIN = 0.02
"""Leaves are merged whose predictions differ by less than this, relatively."""

SMALL_TREES = [name for name in MODELS if name.startswith("small tree")]


def train(
    runs: pd.DataFrame, out: Path, criterion: Criterion, *, jobs: int = -1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit every model to the optima of a sweep, keep the best of each target, and describe it.

    Parameters
    ----------
    runs : pandas.DataFrame
        A sweep (`adapter_twin.learn.sweep.read_sweep`).
    out : pathlib.Path
        Gets a folder per language model, ``comparison.csv`` and ``classifiers.csv``.
    criterion : Criterion
        What makes a configuration the optimum.
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    comparison, classifiers : pandas.DataFrame
        See `adapter_twin.learn.surrogates.compare` and
        `adapter_twin.learn.surrogates.compare_classifiers`; by ``language_model``.

    Raises
    ------
    AdapterTwinError
        Too few workloads to split, or no run starves.
    """
    labels = label(runs, criterion)
    of_language: dict[str, tuple[pd.DataFrame, pd.DataFrame]] = {}
    for language in sorted(labels["model"].unique()):
        own = labels[(labels["model"] == language) & labels.has_optimum].reset_index(drop=True)
        of_language[language] = own, runs[runs["model"] == language]
        rates = own.rates_per_adapter.nunique()
        require(
            rates >= FEWEST_RATES,
            f"{language}: {rates} mixes of rates have an optimum, {FEWEST_RATES} are needed; "
            "sweep more",
        )
        require(
            surrogates.verdicts(of_language[language][1], criterion).serves.nunique() == 2,
            f"{language}: no simulated run starves; sweep higher rates or more served adapters",
        )
    trained = [
        _train_one(*tables, out / language, criterion, jobs)
        for language, tables in of_language.items()
    ]
    both = zip(*trained, strict=True)
    comparison, classifiers = (pd.concat(parts, ignore_index=True) for parts in both)
    write_table(comparison, out / "comparison.csv")
    write_table(classifiers, out / "classifiers.csv")
    return comparison, classifiers


def _train_one(
    labelled: pd.DataFrame, runs: pd.DataFrame, folder: Path, criterion: Criterion, jobs: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and store the models of one language model."""
    folder.mkdir(parents=True, exist_ok=True)
    comparison = surrogates.compare(surrogates.split(labelled), jobs=jobs)
    for _, row in surrogates.chosen(comparison).iterrows():
        store(train_chosen(row, labelled), folder)
    judged = surrogates.verdicts(runs, criterion)
    classifiers = surrogates.compare_classifiers(surrogates.split(judged), jobs=jobs)
    name = surrogates.chosen_classifier(classifiers)
    store_estimator(surrogates.fit_classifier(judged, name), folder / "serves.skops")
    write_text(folder / "rules.txt", small_trees(labelled))
    write_text(
        folder / "README.md", _card(folder.name, comparison, classifiers, len(labelled), criterion)
    )
    language = folder.name
    return comparison.assign(language_model=language), classifiers.assign(language_model=language)


def train_chosen(row: "pd.Series[Any]", labelled: pd.DataFrame) -> Trained:
    """Fit a chosen model to all workloads, and measure what its interval covers of unseen ones.

    Parameters
    ----------
    row : pandas.Series
        Of `adapter_twin.learn.surrogates.chosen`.
    labelled : pandas.DataFrame
        Workloads of one language model that have an optimum.
    """
    what = row.features, row.target, row.model
    about = About(
        target=row.target,
        model=row.model,
        features=row.features,
        interval_factor=interval_factor(labelled, *what),
        coverage=coverage(labelled, *what),
    )
    return Trained(about, fit(labelled, *what))


def coverage(labelled: pd.DataFrame, features: str, target: str, model: str) -> float:
    """Return the share of unseen workloads whose truth lies in the interval.

    Each fifth of the rates in turn is unseen by the model and by the width of its interval.

    Parameters
    ----------
    labelled, features, target, model
        As for `adapter_twin.learn.surrogates.fit`.
    """
    covered = np.zeros(len(labelled), bool)
    for seen, unseen in GroupKFold(FOLDS).split(labelled, groups=labelled.rates_per_adapter):
        train, test = labelled.iloc[seen], labelled.iloc[unseen]
        factor = interval_factor(train, features, target, model)
        fitted = fit(train, features, target, model)
        predicted = fitted.predict(feature_array(features, test))
        ratio = np.abs(np.log(predicted / test[target].to_numpy(float)))
        covered[unseen] = ratio <= np.log(factor) + 1e-9  # a truth at the very end is inside
    return float(covered.mean())


def interval_factor(train: pd.DataFrame, features: str, target: str, model: str) -> float:
    """Return by what factor truth and prediction differ in at most a tenth of unseen workloads.

    Cross-conformal: absolute residuals of logarithms, each of a model that has not seen the
    workload's rates (Vovk 2015, as MAPIE implements it).

    Parameters
    ----------
    train, features, target, model
        As for `adapter_twin.learn.surrogates.fit`.
    """
    x, groups = feature_array(features, train), train.rates_per_adapter
    conformal = CrossConformalRegressor(
        surrogates.make_model(model).regressor,
        confidence_level=CONFIDENCE,
        method="base",
        cv=GroupKFold(FOLDS),
    ).fit_conformalize(x, np.log(train[target].to_numpy(float)), groups=groups)
    point, interval = conformal.predict_interval(x[:1])
    return float(np.exp(interval[0, 1, 0] - point[0]))


def small_trees(labelled: pd.DataFrame) -> str:
    """Return the reference study's kind of tree for every target and depth, as rules."""
    names = list(FEATURES["paper"](labelled.iloc[:1]).columns)
    texts = []
    for target in TARGETS:
        for model in SMALL_TREES:
            tree = fit(labelled, "paper", target, model).regressor_
            texts.append(f"{target}, {model}\n{rules(tree, names)}")
    return "\n".join(texts)


def rules(tree: Any, names: Sequence[str]) -> str:
    """Return a regression tree of a logarithm as rules for the value itself.

    Parameters
    ----------
    tree : sklearn.tree.DecisionTreeRegressor
        Fitted to logarithms.
    names : sequence of str
        Of the features.
    """
    return "\n".join(_described(tree.tree_, 0, names, "")) + "\n"


def _described(tree: Any, node: int, names: Sequence[str], indent: str) -> Iterator[str]:
    low, high = _range(tree, node)
    if high <= low * (1 + MERGED_WITHIN):
        value = float(np.exp(tree.value[node].item()))
        yield f"{indent}: {value:.4g}  ({int(tree.n_node_samples[node])} workloads)"
        return
    name, threshold = names[tree.feature[node]], tree.threshold[node]
    for sign, child in (("<=", tree.children_left[node]), (">", tree.children_right[node])):
        yield f"{indent}{name} {sign} {threshold:.4g}"
        yield from _described(tree, child, names, f"{indent}|   ")


def _range(tree: Any, node: int) -> tuple[float, float]:
    """Return the lowest and highest prediction below a node."""
    if tree.children_left[node] == LEAF:
        value = float(np.exp(tree.value[node].item()))
        return value, value
    ranges = [_range(tree, c) for c in (tree.children_left[node], tree.children_right[node])]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _card(
    name: str,
    comparison: pd.DataFrame,
    classifiers: pd.DataFrame,
    workloads: int,
    criterion: Criterion,
) -> str:
    """Describe the models to whoever is about to use them."""
    rows = "\n".join(
        f"| {row.target} | {row.model} | {row.features} | {row.cv_half_smape:.2f} | "
        f"{row.test_half_smape:.2f} | {row.test_mape:.2f} |"
        for row in surrogates.chosen(comparison).itertuples()
    )
    best = classifiers.set_index("model").loc[surrogates.chosen_classifier(classifiers)]
    return f"""# Surrogates of the optimum of {name}

**What they answer**: how many adapters, on how many slots, at which throughput, for a traffic mix.
The optimum: {criterion}.

**Trained on** {workloads} workloads of a sweep of the twin, none of them measured. Chosen by
cross-validation that leaves whole mixes of rates out; the test column (a fifth of the rates, which
no choice had seen) was looked at afterwards. Halved SMAPE and MAPE in percent.

| target | model | features | CV half-SMAPE | test half-SMAPE | test MAPE |
|---|---|---|---|---|---|
{rows}

**Whether a configuration is served** (`serves.skops`: {best.name}): macro-F1 {best.cv_macro_f1:.3f}
cross-validated, {best.test_macro_f1:.3f} on test; {best.served_wrongly:.1f} % of the test runs are
said to be served and starve.

**Do not use them** outside the sweep's ranges of rates, ranks and lengths, on another GPU or
engine, or where a wrong answer starves a customer: `adapter-twin optimum` asks the twin itself.

Loading runs no code from the files beyond a fixed list of types (`load_trained`).
adapter-twin {__version__}.
"""
