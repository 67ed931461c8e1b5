"""A tree that has learnt from the twin which slots serve a given set of adapters best."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapter_twin.learn.features import traffic_features
from adapter_twin.learn.surrogates import make_model, to_grid
from adapter_twin.learn.sweep import read_sweep, run_sweep
from adapter_twin.plan.candidates import candidate_slots
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.demand import Demand

MODEL = "decision tree"
"""The tree is this one of `adapter_twin.learn.surrogates.MODELS`."""


def learn_slots(design: Path, out: Path, calibration: str) -> Callable[[Demand], int]:
    """Sweep a design with the twin, fit a tree to the best slots, and return it as a method.

    Parameters
    ----------
    design : pathlib.Path
        See `adapter_twin.learn.design.Design`.
    out : pathlib.Path
        Of the sweep.
    calibration : str
    """
    run_sweep(design, out, calibration=calibration)
    tree = fit_tree(read_sweep(out))

    def choose(demand: Demand) -> int:
        """Return the candidate nearest to what the tree says."""
        return int(to_grid(tree.predict(_describe(demand)), candidate_slots(demand))[0])

    return choose


def fit_tree(runs: pd.DataFrame) -> Any:
    """Fit the tree to a sweep: the best slots of every workload at every number of adapters."""
    cell = ["workload_id", "served_adapters"]
    best = Criterion(margin=MARGIN).ranked(runs, within=cell).drop_duplicates(cell)
    return make_model(MODEL).fit(_features(best), best.adapter_slots.to_numpy(float))


def _features(runs: pd.DataFrame) -> NDArray[np.float64]:
    traffic = traffic_features(runs)
    offered = traffic.adapter_load * runs.served_adapters
    return traffic.assign(adapters=runs.served_adapters, offered=offered).to_numpy(float)


def _describe(demand: Demand) -> NDArray[np.float64]:
    """Return a demand's features.

    A sweep's popularity is even or follows Zipf's law; a demand gets the exponent of a straight
    line through its rates on logarithmic axes.
    """
    rates = np.sort([adapter.request_rate for adapter in demand.adapters])[::-1]
    used = rates[rates > 0]
    place = np.log(np.arange(1, len(used) + 1))
    exponent = -np.polyfit(place, np.log(used), 1)[0] if len(used) > 1 else 0.0
    ranks = "-".join(str(adapter.rank) for adapter in demand.adapters)
    row = {
        "model": demand.model,
        "rates_per_adapter": np.format_float_positional(rates.mean()),
        "ranks": ranks,
        "max_lora_rank": demand.max_lora_rank,
        "mean_input_tokens": demand.lengths.mean_input_tokens,
        "mean_requested_output_tokens": demand.lengths.mean_output_tokens,
        "zipf_exponent": max(exponent, 0.0),
        "arrival_cv": demand.arrivals.dispersion(float(rates.mean())) ** 0.5,
        "served_adapters": len(demand.adapters),
    }
    return _features(pd.DataFrame([row]))
