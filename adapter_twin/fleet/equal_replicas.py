"""The fleet of a scenario: equal replicas of its engine behind a router."""

from typing import Any

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.fleet.cluster import ClusterRun, simulate_cluster
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.routers import ROUTERS, Router
from adapter_twin.laws import load_calibration
from adapter_twin.twin.policies import make_policy
from adapter_twin.twin.policy import VLLM
from adapter_twin.workload.named import make_named
from adapter_twin.workload.scenario import Scenario, config_hash


def simulate_fleet(scenario: Scenario) -> tuple[ClusterRun, dict[str, Any]]:
    """Simulate a scenario with a fleet, each of whose replicas may serve every adapter.

    Returns
    -------
    run : ClusterRun
    service : dict
        ``replicas`` and ``router``; the figures of `adapter_twin.service.metrics.service` over all
        requests;
        ``adapter_loads``; provenance.

    Raises
    ------
    AdapterTwinError
        No fleet, no calibration, an unknown router, or a start that the GPU refuses.
    """
    fleet, engine, workload = scenario.fleet, scenario.engine, scenario.workload
    if fleet is None:
        raise AdapterTwinError("fleet: missing; add replicas and router")
    require(not scenario.observer, "observer: the measurement was of one engine; leave it out")
    calibration = load_calibration(scenario.calibration, engine.model)
    calibration.warn_if_prior()
    router = make_named(fleet.router, ROUTERS, Router, "fleet.router")
    policy = make_policy(scenario.policy, "engine.policy")
    count = len(workload.adapters)
    plan = ReplicaPlan(engine, tuple(range(count)), (1 / fleet.replicas,) * count)
    run = simulate_cluster(
        workload,
        Placement((plan,) * fleet.replicas),
        calibration,
        router,
        seed=scenario.seed,
        policy=policy,
    )
    return run, {
        "replicas": fleet.replicas,
        "router": repr(router),
        **run.service(slo=scenario.slo, adapters=workload.adapters),
        "adapter_loads": sum(run.adapter_loads),
        "config_hash": config_hash(scenario),
        "seed": scenario.seed,
        "version": __version__,
        "calibration": calibration.name,
        "prior": calibration.origin or None,
        **({} if policy == VLLM else {"policy": repr(policy)}),
    }
