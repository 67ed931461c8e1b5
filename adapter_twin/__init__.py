"""A digital twin of a GPU that serves many LoRA adapters with vLLM.

From a workload and an engine configuration to the service they would get: throughput, latency,
starvation; and from there to how many adapters one GPU takes and how many slots to give them.

Start with these three files: `adapter_twin.workload.scenario`, what is asked;
`adapter_twin.twin.scheduler`, vLLM's scheduler, step by step; `adapter_twin.service.metrics`, what
is reported of a run. Folders follow the data: workload, tables, laws, twin, service, calibrate,
capacity, plan, learn, fleet, measure, prove, cli; each imports only from those before it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; who imports gets them from `__getattr__`
    from adapter_twin.errors import AdapterTwinError
    from adapter_twin.fleet.place import place
    from adapter_twin.laws.calibration import Calibration
    from adapter_twin.laws.find import load_calibration
    from adapter_twin.plan.demand import Demand, load_demand
    from adapter_twin.plan.optimum import optimum
    from adapter_twin.plan.recommend import recommend
    from adapter_twin.service.metrics import service_of, summarize
    from adapter_twin.service.predict import predict
    from adapter_twin.twin.simulate import simulate
    from adapter_twin.workload.adapters import Adapter, deal_adapters, zipf_adapters
    from adapter_twin.workload.calibration_files import list_calibrations
    from adapter_twin.workload.engine_config import EngineConfig
    from adapter_twin.workload.files import load_scenario
    from adapter_twin.workload.scenario import Slo
    from adapter_twin.workload.traffic import Arrivals, Lengths, Workload

    __version__: str

_HOMES = {
    "Adapter": "workload.adapters",
    "AdapterTwinError": "errors",
    "Arrivals": "workload.traffic",
    "Calibration": "laws.calibration",
    "Demand": "plan.demand",
    "EngineConfig": "workload.engine_config",
    "Lengths": "workload.traffic",
    "Slo": "workload.scenario",
    "Workload": "workload.traffic",
    "deal_adapters": "workload.adapters",
    "list_calibrations": "workload.calibration_files",
    "load_calibration": "laws.find",
    "load_demand": "plan.demand",
    "load_scenario": "workload.files",
    "optimum": "plan.optimum",
    "place": "fleet.place",
    "predict": "service.predict",
    "recommend": "plan.recommend",
    "service_of": "service.metrics",
    "simulate": "twin.simulate",
    "summarize": "service.metrics",
    "zipf_adapters": "workload.adapters",
}
"""The module of each public name, imported when the name is first used."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer than all else here

        return version("adapter-twin")
    if name not in _HOMES:
        raise AttributeError(f"module 'adapter_twin' has no attribute {name!r}")
    return getattr(import_module(f"adapter_twin.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
