"""Explanations of the models: inference of the linear one, importance and dependence of any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_twin.learn.surrogates import FEATURES, fit, logarithms
from adapter_twin.learn.training import rules
from adapter_twin.service.metrics import half_smape

if TYPE_CHECKING:
    import pandas as pd

REPEATS = 20
"""Each feature is permuted this number of times."""


def leaves(tree: Any) -> int:
    """Return the number of leaves of a small tree once those that agree are merged."""
    return rules(tree, [str(i) for i in range(tree.n_features_in_)]).count(": ")


def regress(labelled: pd.DataFrame, features: str, target: str) -> Any:
    """Regress the logarithm of a target on the standardised logarithms of the features.

    Ordinary least squares; standard errors are robust to correlation within a mix of rates.
    Features that do not vary are left out, and those that others determine.

    Returns
    -------
    statsmodels.regression.linear_model.RegressionResultsWrapper
    """
    import pandas as pd
    import statsmodels.api as sm

    table = FEATURES[features](labelled)
    x = pd.DataFrame(logarithms(table), columns=table.columns, index=table.index)
    x = x.loc[:, x.std() > 1e-9]
    x = (x - x.mean()) / x.std()
    groups = pd.factorize(labelled.rates_per_adapter)[0]
    model = sm.OLS(np.log(labelled[target].astype(float)), sm.add_constant(_independent(x)))
    return model.fit(cov_type="cluster", cov_kwds={"groups": groups})


def _independent(x: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that are no linear combination of those before them."""
    kept: list[str] = []
    for name in x:
        if np.linalg.matrix_rank(x[[*kept, name]].to_numpy(), tol=1e-6) > len(kept):
            kept.append(str(name))
    return x[kept]


def coefficients(fitted: Any) -> pd.DataFrame:
    """Return coefficients of `regress` as percent per standard deviation of the feature.

    Returns
    -------
    pandas.DataFrame
        ``feature``; ``percent`` by which the target changes, with its 95 % interval ``low`` to
        ``high``; ``p``; ``vif``, the variance inflation factor.
    """
    import pandas as pd
    from statsmodels.stats.outliers_influence import variance_inflation_factor

    names = list(fitted.params.index[1:])
    interval = fitted.conf_int().loc[names]
    design = fitted.model.exog
    return pd.DataFrame(
        {
            "feature": names,
            "percent": 100 * np.expm1(fitted.params[names].to_numpy()),
            "low": 100 * np.expm1(interval[0].to_numpy()),
            "high": 100 * np.expm1(interval[1].to_numpy()),
            "p": fitted.pvalues[names].to_numpy(),
            "vif": [variance_inflation_factor(design, i + 1) for i in range(len(names))],
        }
    )


def diagnostics(fitted: Any) -> dict[str, float]:
    """Return whether the assumptions of `regress` hold.

    Returns
    -------
    dict
        ``r_squared``; ``condition_number``; p-values of Breusch and Pagan (equal variance), Jarque
        and Bera (normal residuals), and Ramsey's RESET (the form is linear).
    """
    from statsmodels.stats.diagnostic import het_breuschpagan, linear_reset
    from statsmodels.stats.stattools import jarque_bera

    return {
        "r_squared": float(fitted.rsquared),
        "condition_number": float(fitted.condition_number),
        "breusch_pagan_p": float(het_breuschpagan(fitted.resid, fitted.model.exog)[1]),
        "jarque_bera_p": float(jarque_bera(fitted.resid)[1]),
        "reset_p": float(linear_reset(fitted, power=2, use_f=True).pvalue),
    }


def importance(
    train: pd.DataFrame,
    test: pd.DataFrame,
    features: str,
    target: str,
    models: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """Return by how much the error on test grows where one feature is permuted.

    Returns
    -------
    pandas.DataFrame
        ``model, feature``; ``increase`` of the halved SMAPE in points, its mean over `REPEATS`;
        ``low`` and ``high``, its 2.5 and 97.5 % percentiles.
    """
    import pandas as pd
    from sklearn.inspection import permutation_importance
    from sklearn.metrics import make_scorer

    table = FEATURES[features](test)
    error = make_scorer(half_smape, greater_is_better=False)
    parts = []
    for model in models:
        fitted = fit(train, features, target, model)
        increases = permutation_importance(
            fitted,
            table.to_numpy(float),
            test[target].to_numpy(float),
            scoring=error,
            n_repeats=REPEATS,
            random_state=seed,
        ).importances
        low, high = np.percentile(increases, [2.5, 97.5], axis=1)
        figures = {"increase": increases.mean(axis=1), "low": low, "high": high}
        parts.append(pd.DataFrame({"model": model, "feature": list(table), **figures}))
    return pd.concat(parts, ignore_index=True)


def dependence(
    labelled: pd.DataFrame, features: str, target: str, models: Sequence[str], names: Sequence[str]
) -> pd.DataFrame:
    """Return partial dependence: the mean prediction over all workloads as one feature varies.

    Returns
    -------
    pandas.DataFrame
        ``model, feature, value`` of the feature, ``predicted``.
    """
    import pandas as pd
    from sklearn.inspection import partial_dependence

    table = FEATURES[features](labelled)
    tables = []
    for model in models:
        fitted = fit(labelled, features, target, model)
        for name in names:
            found = partial_dependence(
                fitted,
                table.to_numpy(float),
                [list(table).index(name)],
                percentiles=(0.02, 0.98),
                grid_resolution=40,
                kind="average",
            )
            values = {"value": found["grid_values"][0], "predicted": found["average"][0]}
            tables.append(pd.DataFrame(values).assign(model=model, feature=name))
    return pd.concat(tables, ignore_index=True)
