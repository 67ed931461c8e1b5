"""Trained models on disk, without pickle: only code of the types named here runs on loading."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import skops.io

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.learn.surrogates import feature_array
from adapter_twin.tables.datasets import replacing, write_text
from adapter_twin.workload.strict import dataclass, read

TRUSTED = (
    "adapter_twin.learn.surrogates.logarithms",
    "interpret.glassbox._ebm._ebm.ExplainableBoostingClassifier",
    "interpret.glassbox._ebm._ebm.ExplainableBoostingRegressor",
    "scipy._lib.array_api_compat.numpy._aliases.asarray",
    "scipy.interpolate._bsplines.BSpline",
    "sklearn.tree._tree.Tree",
)
"""Models are made of these types beyond skops' own list."""


@dataclass(frozen=True, slots=True)
class About:
    """What a stored model predicts, and how well.

    Attributes
    ----------
    target : str
        One of `adapter_twin.learn.surrogates.TARGETS`.
    model, features : str
        See `adapter_twin.learn.surrogates`.
    interval_factor : float
        The true value lies within prediction / factor and prediction x factor, 9 times of 10.
    coverage : float
        Share of unseen workloads for which it did.
    version : str
        Of this package, which trained it.
    """

    target: str
    model: str
    features: str
    interval_factor: float
    coverage: float
    version: str = __version__


@dataclass(frozen=True, slots=True)
class Trained:
    """A model of one figure of the optimum.

    Attributes
    ----------
    about : About
    estimator : estimator
    """

    about: About
    estimator: Any

    def predict(self, workloads: pd.DataFrame) -> tuple[Any, Any, Any]:
        """Return predictions, and the ends of their intervals, for rows of a table of workloads."""
        value = self.estimator.predict(feature_array(self.about.features, workloads))
        factor = self.about.interval_factor
        return value, value / factor, value * factor


def store(trained: Trained, folder: Path) -> None:
    """Write ``<target>.skops``, and ``<target>.json`` about it."""
    target = trained.about.target
    store_estimator(trained.estimator, folder / f"{target}.skops")
    text = json.dumps(asdict(trained.about), indent=1) + "\n"
    write_text(folder / f"{target}.json", text)


def load_trained(folder: Path, target: str) -> Trained:
    """Load the model of one target.

    Raises
    ------
    AdapterTwinError
        There is none, or it is made of types that none of our models is made of.
    """
    estimator = load_estimator(folder / f"{target}.skops")
    path = folder / f"{target}.json"
    try:
        return Trained(read(About, json.loads(path.read_text(encoding="utf-8"))), estimator)
    except (OSError, ValueError) as error:
        raise AdapterTwinError(
            f"{path}: does not tell about the model ({error!r}); run adapter-twin train again"
        ) from None


def store_estimator(estimator: Any, path: Path) -> None:
    """Write one estimator."""
    with replacing(path) as temporary:
        skops.io.dump(estimator, temporary)


def load_estimator(path: Path) -> Any:
    """Load one estimator.

    Raises
    ------
    AdapterTwinError
        There is none, or it is made of types that none of our models is made of.
    """
    require(path.is_file(), f"{path}: no such model; run adapter-twin train first")
    try:
        foreign = sorted(set(skops.io.get_untrusted_types(file=path)) - set(TRUSTED))
        estimator = None if foreign else skops.io.load(path, trusted=list(TRUSTED))
    except Exception as error:  # whatever a file that is no model makes skops raise
        raise AdapterTwinError(f"{path}: is no stored model ({error})") from None
    if foreign:
        raise AdapterTwinError(f"{path}: holds {foreign[0]}, which is no part of our models")
    return estimator
