"""A demand: concrete adapters with their traffic, from a YAML file or a request log."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.calibration import version_of
from adapter_twin.plan.grid import Grid, slot_rank
from adapter_twin.workload.calibration_files import complete
from adapter_twin.workload.files import read_yaml
from adapter_twin.workload.lengths import Floats
from adapter_twin.workload.request_log import BASE_MODEL, RequestLog, read_requests
from adapter_twin.workload.scenario import (
    Adapters,
    Arrivals,
    EngineConfig,
    Lengths,
    ServeFlags,
    Slo,
    Workload,
)
from adapter_twin.workload.strict import NotNegative, Whole, dataclass, read

BURSTY_CV = 1.25
"""Arrivals whose gaps vary less are taken as Poisson."""

LEAST_CV = 0.01
"""Lengths that vary less than this are as good as constant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Adapters to be served, their traffic, and the service they shall get.

    Attributes
    ----------
    model : str
    adapters : tuple of Adapter
    lengths : Lengths
    arrivals : Arrivals
        Poisson or gamma.
    base_model_request_rate : float
        Requests/s to the base model, without an adapter.
    slo : Slo, optional
    calibration : str
        Name of a calibration, or ``auto``: the one of the model.
    seed : int
    engine : ServeFlags
        All flags but slots, host cache and rank, which are chosen.
    slots : tuple of int, optional
        Numbers of adapter slots to choose from; left out, all sizes are tried.
    """

    model: str
    adapters: Annotated[Adapters, Field(min_length=1)]
    lengths: Lengths
    arrivals: Arrivals = field(default_factory=Arrivals)
    base_model_request_rate: NotNegative = 0.0
    slo: Slo | None = None
    calibration: str = "auto"
    seed: Whole = 0
    engine: ServeFlags = field(default_factory=ServeFlags)
    slots: Grid | None = None

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            require(
                not adapter.pinned,
                f"adapters: {adapter.name!r} is pinned, which only `simulate` knows; leave "
                "`pinned` out",
            )
            require(
                adapter.priority == 0,
                f"adapters: {adapter.name!r} has a priority, which only `simulate` knows; leave "
                "`priority` out",
            )
        require(
            self.lengths.shared_prefix_tokens == 0,
            "lengths.shared_prefix_tokens: only `simulate` knows it; leave it out",
        )
        require(
            self.arrivals.process in ("poisson", "gamma"),
            f"arrivals.process: {self.arrivals.process} cannot be planned with; use poisson or "
            "gamma, or give a request_log",
        )
        steady = "arrivals: period_s, num_prompts and max_concurrency are for `simulate`; leave out"
        require(self.arrivals.is_steady, steady)
        if self.slots is not None:
            require(
                min(self.slots) <= len(self.adapters),
                f"slots: all are above the number of adapters, {len(self.adapters)}",
            )
        require(self.workload(1.0).offered_request_rate > 0, "adapters: none of them has requests")
        slot_rank([adapter.rank for adapter in self.adapters])

    @property
    def max_lora_rank(self) -> int:
        """The rank at which vLLM has to reserve every slot."""
        ranks = [adapter.rank for adapter in self.adapters]
        if max(ranks) > 1:
            return slot_rank(ranks)
        # slots of rank 1 are all that versions differ in
        return slot_rank(ranks, version_of(self.calibration, self.model))

    def workload(self, duration_s: float, load: float = 1.0) -> Workload:
        """Return the traffic of a window, all rates multiplied by `load`."""
        scaled = (replace(a, request_rate=load * a.request_rate) for a in self.adapters)
        return Workload(
            adapters=self.adapters if load == 1 else tuple(scaled),
            duration_s=duration_s,
            lengths=self.lengths,
            arrivals=self.arrivals,
            base_model_request_rate=load * self.base_model_request_rate,
        )

    def engine_with(self, slots: int) -> EngineConfig:
        """Return the engine that keeps all adapters in host memory and `slots` on the GPU."""
        return EngineConfig(
            model=self.model,
            max_loras=slots,
            max_cpu_loras=len(self.adapters),
            max_lora_rank=self.max_lora_rank,
            **{flag.name: getattr(self.engine, flag.name) for flag in fields(ServeFlags)},
        )

    def subset(self, count: int) -> Demand:
        """Return the demand of `count` adapters, spread evenly over all rates and ranks."""
        ordered = sorted(self.adapters, key=lambda adapter: (adapter.request_rate, adapter.rank))
        chosen = ((np.arange(count) + 0.5) * len(ordered) / count).astype(int)
        return replace(
            self,
            adapters=tuple(ordered[i] for i in chosen),
            base_model_request_rate=self.base_model_request_rate * count / len(ordered),
            slots=self.slots and (tuple(size for size in self.slots if size <= count) or (count,)),
        )


def load_demand(path: str | Path) -> Demand:
    """Read a ``WORKLOAD.yaml``: the keys of `Demand`.

    Adapters are listed or in one of the short forms of
    `adapter_twin.workload.files.load_scenario`. In place of rates and `lengths` there may be a
    ``request_log``, the path of a table relative to the file, see
    `adapter_twin.workload.request_log`; adapters then have a name and a rank only.

    Raises
    ------
    AdapterTwinError
        The file or the log cannot be read, a key or a column is unknown, missing or wrong, or an
        adapter has no rate.
    """
    file = Path(path)
    content = read_yaml(file)
    if not isinstance(content, dict):
        return read(Demand, content)
    engine = content.get("engine")
    if isinstance(engine, dict) and "defaults" in engine:
        model, calibration = str(content.get("model")), str(content.get("calibration", "auto"))
        content["engine"] = complete(engine, calibration, model)
    log = content.pop("request_log", None)
    if log is None:
        _require_rates(content.get("adapters"))
    else:
        require(isinstance(log, str), f"request_log: expected the path of a table, got {log!r}")
        for name in ("lengths", "arrivals", "base_model_request_rate"):
            require(name not in content, f"{name}: the request_log tells; leave it out")
        logged = file.parent / log
        content |= measure(read_requests(logged), content.get("adapters"), logged)
    return read(Demand, content)


def _require_rates(adapters: object) -> None:
    """Refuse adapters without traffic by their names."""
    for i, adapter in enumerate(adapters if isinstance(adapters, list) else []):
        if isinstance(adapter, dict) and not adapter.get("request_rate"):
            name = adapter.get("name", i)
            raise AdapterTwinError(
                f"adapters[{i}].request_rate: adapter {name!r} has no rate; give its requests/s, "
                "or a request_log for all"
            )


def measure(log: RequestLog, adapters: object, path: Path) -> dict[str, Any]:
    """Return the keys of `Demand` that follow from a request log.

    Parameters
    ----------
    log : RequestLog
    adapters : object
        What the YAML file lists: names and ranks.
    path : pathlib.Path
        Of the log, for messages.

    Returns
    -------
    dict
        ``adapters`` with their rates, 0 for those without a request, equal ones where the log tells
        no adapters; ``base_model_request_rate``; ``arrivals``, as bursty as each adapter's own;
        ``lengths``: log-normal with the log's means, the mean of its two coefficients of variation,
        and its rank correlation.
    """
    turns = "request_log: holds conversations, which only `simulate` knows; drop their columns"
    require(log.after is None, turns)
    first, last, n = log.arrival_s[0], log.arrival_s[-1], len(log.arrival_s)
    require(n > 1 and last > first, "request_log: give requests at two different times")
    span_s = float(last - first) * n / (n - 1)  # n arrivals span n - 1 gaps
    listed = adapters if isinstance(adapters, list) else []
    names = [str(one.get("name")) if isinstance(one, Mapping) else "" for one in listed]
    index = log.indices(names, path)
    if index is None:
        warnings.warn(f"{path}: names no adapters; all get an equal share", stacklevel=2)
        counts, base = np.full(len(names), n / max(len(names), 1)), 0.0
    else:
        counts = np.bincount(index[index >= 0], minlength=len(names)).astype(float)
        base = float((index == BASE_MODEL).sum() / span_s)
    return {
        "adapters": [_with_rate(one, i, counts / span_s) for i, one in enumerate(listed)],
        "base_model_request_rate": base,
        "arrivals": _arrivals(log.gap_cv, path),
        "lengths": _lengths(log),
    }


def _arrivals(cv: float, path: Path) -> dict[str, Any]:
    """Return a renewal process as bursty as the gaps between each adapter's requests."""
    if cv < BURSTY_CV:
        return {"process": "poisson"}
    warnings.warn(
        f"{path}: arrivals are bursty (gaps of cv {cv:.2g}); they are drawn as such, those of each "
        "adapter apart",
        stacklevel=3,
    )
    return {"process": "gamma", "cv": cv}


def _with_rate(adapter: object, i: int, rates: Floats) -> object:
    if not isinstance(adapter, Mapping):
        return adapter
    told = "request_rate" in adapter
    require(not told, f"adapters[{i}].request_rate: the request_log tells; leave it out")
    return {**adapter, "request_rate": float(rates[i])}


def _lengths(log: RequestLog) -> dict[str, Any]:
    import pandas as pd

    told = {"prompt_tokens": log.prompt_tokens, "output_tokens": log.output_tokens}
    columns = pd.DataFrame(told).astype(float)
    mean, deviation = columns.mean(), columns.std(ddof=0)
    constant = bool((deviation == 0).any())
    correlation = 0.0 if constant else columns.corr("spearman").to_numpy()[0, 1]
    return {
        "distribution": "lognormal",
        "mean_input_tokens": float(mean.prompt_tokens),
        "mean_output_tokens": float(mean.output_tokens),
        "cv": max(float((deviation / mean).mean()), LEAST_CV),
        "rank_correlation": float(correlation),
    }
