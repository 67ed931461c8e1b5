"""A demand: concrete adapters with their traffic, from a YAML file or a request log."""

from __future__ import annotations

from dataclasses import asdict, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.find import load_calibration, version_of
from adapter_twin.plan.criterion import DEFAULT_SLO
from adapter_twin.plan.grid import Grid, slot_rank
from adapter_twin.plan.logged import draw_log, read_log
from adapter_twin.workload.adapter_folders import resolve
from adapter_twin.workload.adapters import Adapters, Rate
from adapter_twin.workload.calibration_files import complete, take_gpu
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.files import read_yaml
from adapter_twin.workload.gpu_fleet import GpuFleet
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.strict import Whole, dataclass, read
from adapter_twin.workload.trace import Trace
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Adapters to be served, their traffic, and the service they shall get.

    Attributes
    ----------
    model : str
    adapters : tuple of Adapter
    lengths : Lengths
    arrivals : Arrivals
        Poisson, gamma or on_off; with `max_concurrency`, of a client that has so many requests
        under way at most.
    base_model_request_rate : float
        Requests/s to the base model, without an adapter.
    slo : Slo, optional
    calibration : str
        A name, the path of a ``.json`` file, or ``auto``: the one of the model.
    seed : int
    engine : ServeFlags
        All flags but slots, host cache and rank, which are chosen.
    slots : tuple of int, optional
        Numbers of adapter slots to choose from; left out, all sizes are tried.
    fleet : GpuFleet
        What `place` may build of; left out, any number of GPUs of the calibration.
    trace : Trace, optional
        The requests of a log, which are replayed: rates and lengths only say what they amount to.
    """

    model: str
    adapters: Annotated[Adapters, Field(min_length=1)]
    lengths: Lengths
    arrivals: Arrivals = field(default_factory=Arrivals)
    base_model_request_rate: Rate = 0.0
    slo: Slo | None = None
    calibration: str = "auto"
    seed: Whole = 0
    engine: ServeFlags = field(default_factory=ServeFlags)
    slots: Grid | None = None
    fleet: GpuFleet = field(default_factory=GpuFleet)
    trace: SkipJsonSchema[Any] = None

    def __post_init__(self) -> None:
        is_trace = self.trace is None or isinstance(self.trace, Trace)
        require(is_trace, "trace: unknown key; give the path of a log as request_log")
        for adapter in self.adapters:
            require(
                not adapter.pinned,
                f"adapters: {adapter.name!r} is pinned, which only `simulate` knows; leave "
                "`pinned` out",
            )
            require(
                adapter.priority == 0 or self.engine.scheduling_policy == "priority",
                f"adapters: {adapter.name!r} has a priority, which counts with "
                "engine.scheduling_policy: priority only; set that, or leave it out",
            )
        require(
            self.arrivals.process in ("poisson", "gamma", "on_off"),
            f"arrivals.process: {self.arrivals.process} cannot be planned with; use poisson, gamma "
            "or on_off, or give a request_log",
        )
        require(
            self.arrivals.amplitude == 0,
            "arrivals.amplitude: a plan draws a log of it; read it with `load_demand`",
        )
        require(
            self.arrivals.num_prompts is None or self.is_closed_loop,
            "arrivals.num_prompts: all at once, they wait as long as they are many; give "
            "max_concurrency beside it",
        )
        if self.slots is not None:
            require(
                min(self.slots) <= len(self.adapters),
                f"slots: all are above the number of adapters, {len(self.adapters)}",
            )
        require(self.workload(1.0).offered_request_rate > 0, "adapters: none of them has requests")
        slot_rank([adapter.rank for adapter in self.adapters])

    @property
    def is_closed_loop(self) -> bool:
        """Whether the client waits for answers before it sends more than it may have under way."""
        return self.arrivals.max_concurrency is not None

    @property
    def max_lora_rank(self) -> int:
        """The rank at which vLLM has to reserve every slot."""
        ranks = [adapter.rank for adapter in self.adapters]
        if max(ranks) > 1:
            return slot_rank(ranks)
        # slots of rank 1 are all that versions differ in
        return slot_rank(ranks, version_of(self.calibration, self.model))

    def workload(self, duration_s: float, load: float = 1.0) -> Workload:
        """Return the traffic of a window, of `load` times the clients: so are all rates."""
        scaled = (replace(a, request_rate=load * a.request_rate) for a in self.adapters)
        return Workload(
            adapters=self.adapters if load == 1 else tuple(scaled),
            duration_s=duration_s,
            lengths=self.lengths,
            arrivals=self.arrivals.for_clients(load),
            base_model_request_rate=load * self.base_model_request_rate,
        )

    def engine_with(self, slots: int) -> EngineConfig:
        """Return the engine that keeps all adapters in host memory and `slots` on the GPU."""
        flags = {flag.name: getattr(self.engine, flag.name) for flag in fields(ServeFlags)}
        if flags["enable_prefix_caching"] is None:
            shares = self.trace is not None and self.trace.contents is not None
            flags["enable_prefix_caching"] = self.lengths.shared_prefix_tokens > 0 or shares or None
        return EngineConfig(
            model=self.model,
            max_loras=slots,
            max_cpu_loras=len(self.adapters),
            max_lora_rank=self.max_lora_rank,
            **flags,
        )

    def subset(self, count: int) -> Demand:
        """Return the demand of `count` adapters, spread evenly over all rates and ranks."""
        rates = [adapter.request_rate for adapter in self.adapters]
        ordered = np.lexsort(([adapter.rank for adapter in self.adapters], rates))
        chosen = ordered[((np.arange(count) + 0.5) * len(ordered) / count).astype(int)]
        return self.only(chosen, count / len(ordered))

    def only(self, chosen: NDArray[np.int64], base_model_share: float = 1.0) -> Demand:
        """Return the demand of some of the adapters.

        Parameters
        ----------
        chosen : int64, shape (n,)
            Their numbers.
        base_model_share : float
            Share of the requests to the base model that are kept.
        """
        slots = self.slots and tuple(size for size in self.slots if size <= len(chosen))
        return replace(
            self,
            adapters=tuple(self.adapters[i] for i in chosen),
            base_model_request_rate=base_model_share * self.base_model_request_rate,
            slots=None if self.slots is None else slots or (len(chosen),),
            trace=None if self.trace is None else self.trace.only(chosen, base_model_share),
        )


def load_demand(path: str | Path) -> Demand:
    """Read a ``WORKLOAD.yaml``: the keys of `Demand`.

    Adapters are told as in `adapter_twin.workload.files.load_scenario`. In place of rates and
    `lengths` there may be a ``request_log``, the path of a table relative to the file, see
    `adapter_twin.workload.request_log`; adapters are then told without rates, and of ``arrivals``
    only ``max_concurrency``. ``sessions`` and
    ``samples`` are those of a `adapter_twin.workload.traffic.Workload`; with them, or with a rate
    that follows a sine, a log is drawn once and replayed. Without an ``slo``
    the demand has to meet `adapter_twin.plan.criterion.DEFAULT_SLO`, with ``slo: none`` none. A
    ``gpu`` in place of a calibration is the one that was measured there, or a prior.

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
    take_gpu(content)
    _take_kinds(content)
    slo = content.get("slo", asdict(DEFAULT_SLO))
    content["slo"] = None if slo == "none" else slo
    engine = content.get("engine")
    if isinstance(engine, dict) and "defaults" in engine:
        model, calibration = str(content.get("model")), str(content.get("calibration", "auto"))
        content["engine"] = complete(engine, calibration, model)
    if "adapters" in content:
        content["adapters"] = resolve(content["adapters"], file, str(content.get("model")), {})
    log = content.pop("request_log", None)
    if log is None:
        _require_rates(content.get("adapters"))
        return _drawn(content)
    require(isinstance(log, str), f"request_log: expected the path of a table, got {log!r}")
    for name in ("lengths", "base_model_request_rate"):
        require(name not in content, f"{name}: the request_log tells; leave it out")
    arrivals = read(Arrivals, content.get("arrivals", {}), "arrivals")
    places = Arrivals(max_concurrency=arrivals.max_concurrency)
    require(
        arrivals == places,
        "arrivals: the request_log tells; leave out all but max_concurrency",
    )
    keys, trace = read_log(content.get("adapters"), file.parent / log)
    trace = replace(trace, max_concurrency=places.max_concurrency)
    return replace(read(Demand, content | keys | {"arrivals": asdict(places)}), trace=trace)


def _drawn(content: dict[str, Any]) -> Demand:
    """Read a demand; of traffic that is more than requests at constant rates, a log is drawn."""
    waiting = {"sessions": content.pop("sessions", None), "samples": content.pop("samples", 1)}
    arrivals = content.get("arrivals")
    sine = isinstance(arrivals, dict) and arrivals.get("amplitude", 0) != 0
    if waiting == {"sessions": None, "samples": 1} and not sine:
        return read(Demand, content)
    require("model" in content, "model: missing; add this key")
    model, calibration = str(content["model"]), str(content.get("calibration", "auto"))
    keys, trace = draw_log(content | waiting, load_calibration(calibration, model))
    return replace(read(Demand, content | keys), trace=trace)


def _take_kinds(content: dict[str, Any]) -> None:
    """Replace the ``gpu`` of each of the fleet's kinds by the calibration that it stands for."""
    fleet, engine = content.get("fleet"), content.get("engine")
    kinds = fleet.get("kinds") if isinstance(fleet, dict) else None
    kinds = [kind for kind in kinds if isinstance(kind, dict)] if isinstance(kinds, list) else []
    for kind in kinds:
        take_gpu(kind)
    completed = isinstance(engine, dict) and engine.get("defaults") == "vllm"
    require(
        len(kinds) < 2 or not completed,
        "engine.defaults: vLLM's own differ between the GPUs of fleet.kinds; give the flags",
    )


def _require_rates(adapters: object) -> None:
    """Refuse adapters without traffic by their names."""
    for i, adapter in enumerate(adapters if isinstance(adapters, list) else []):
        if isinstance(adapter, dict) and not adapter.get("request_rate"):
            name = adapter.get("name", i)
            raise AdapterTwinError(
                f"adapters[{i}].request_rate: adapter {name!r} has no rate; give its requests/s, "
                "or a request_log for all"
            )
