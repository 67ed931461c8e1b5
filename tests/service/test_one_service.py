"""One run, one service: every part of the package tells the same figures of it."""

from dataclasses import replace

import numpy as np
import pytest

from adapter_twin.fleet.cluster import simulate_cluster
from adapter_twin.fleet.hold import check_placement
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.routers import Placed
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import evaluate, grid_runs
from adapter_twin.plan.steady_state import WARM_UP_S, draw_traffic, serve, worst_adapter
from adapter_twin.prove import outcome
from adapter_twin.service.metrics import Service, service, service_of
from adapter_twin.service.predict import predict_scenario
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import run_to_workload
from adapter_twin.workload.scenario import Scenario, Slo
from adapter_twin.workload.traffic import Lengths

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")

LLAMA = "llama-3.1-8b-instruct"
LENGTHS = Lengths(mean_input_tokens=223, mean_output_tokens=198)
SLO = Slo(ttft_ms=2000, itl_ms=100)
# 24 adapters on 2 slots: some wait for long, and requests are left without a first token.
ASKED = Demand(model=LLAMA, adapters=deal_adapters(24, [0.4, 0.1], [8]), lengths=LENGTHS, slo=SLO)
ENGINE = EngineConfig(model=LLAMA, max_loras=2, max_cpu_loras=24, max_lora_rank=8)
DURATION_S, SEED = 300.0, 6


@pytest.fixture(scope="module")
def laws() -> Calibration:
    return load_calibration("auto", LLAMA)


@pytest.fixture(scope="module")
def told(laws: Calibration) -> Service:
    run = simulate(ASKED.workload(DURATION_S), ENGINE, laws, seed=SEED)
    adapters = ASKED.adapters
    found = service(run.records, run.gaps, run.duration_s, slo=SLO, adapters=adapters)
    assert found["never_started_requests"] > 0
    assert found["ttft_is_lower_bound"]
    assert found["completed_mean_ttft_ms"] < found["mean_ttft_ms"]
    assert f"24 adapters on 2 slots, {len(run.records):,} requests" in repr(run)
    return found


def test_the_command_simulate_tells_it(told: Service) -> None:
    workload = ASKED.workload(DURATION_S)
    _, content = predict_scenario(Scenario(engine=ENGINE, workload=workload, slo=SLO, seed=SEED))
    assert {name: content[name] for name in told} == told


def test_a_cluster_and_its_replicas_tell_it(laws: Calibration, told: Service) -> None:
    placement = Placement((ReplicaPlan(ENGINE, tuple(range(24)), (1.0,) * 24),))
    router = Placed()
    run = simulate_cluster(ASKED.workload(DURATION_S), placement, laws, router, seed=SEED)
    same = {k: v for k, v in told.items() if k not in ("worst_adapter", "slo_attainment")}
    for found in (run.service(), run.by_replica().loc[0]):
        assert {name: found[name] for name in same} == pytest.approx(same)


def test_the_check_of_a_placement_tells_it(laws: Calibration, told: Service) -> None:
    placement = Placement((ReplicaPlan(ENGINE, tuple(range(24)), (1.0,) * 24),))
    checked = check_placement(ASKED, placement, laws, seed=SEED, duration_s=DURATION_S, jobs=1).loc[
        0
    ]
    for name in ("offered_tokens_per_s", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms"):
        assert checked[name] == told[name]
    assert checked.worst_adapter == told["worst_adapter"]
    assert checked.worst_adapter_mean_ttft_ms == told["worst_adapter_mean_ttft_ms"]
    assert checked.slo_attainment == told["slo_attainment"]
    assert not checked.serves


def test_the_optimum_tells_it(laws: Calibration) -> None:
    mix = {
        "model": LLAMA,
        "rates_per_adapter": "0.4-0.1",
        "ranks": "8",
        "mean_input_tokens": 223,
        "mean_requested_output_tokens": 198,
    }
    runs = grid_runs(mix, [24], [2], DURATION_S)
    found = evaluate(runs, laws, seed=SEED, slo=SLO).loc[0]
    engine, workload = run_to_workload(runs.loc[0].to_dict())
    run = service_of(simulate(workload, engine, laws, seed=SEED), slo=SLO)
    for name in ("total_throughput", "mean_ttft_ms", "p99_ttft_ms", "p99_itl_ms", "slo_attainment"):
        assert found[name] == run[name]


def test_a_recommendation_tells_it_after_the_warm_up(laws: Calibration) -> None:
    traffic = draw_traffic(ASKED, laws, seed=SEED)
    window = serve(traffic, ENGINE, laws)
    run = simulate(traffic.workload, ENGINE, laws, seed=SEED, trace=traffic.trace)
    told = service_of(run, slo=SLO, warm_up_s=WARM_UP_S)
    assert window.figures == {name: told[name] for name in window.figures}
    worst = worst_adapter(ASKED, [window])
    assert worst is not None
    assert worst["name"] == told["worst_adapter"]
    assert worst["mean_ttft_ms"] == pytest.approx(told["worst_adapter_mean_ttft_ms"])
    assert worst["p99_ttft_ms"] == pytest.approx(told["worst_adapter_p99_ttft_ms"])


def test_a_proof_tells_it_of_what_was_measured(laws: Calibration) -> None:
    run = simulate(ASKED.workload(DURATION_S), ENGINE, laws, seed=SEED)
    unseen = np.full(len(run.records), np.nan)
    measured = replace(run.records, scheduled_s=unseen, load_wait_s=unseen)
    told = service(measured, None, DURATION_S, slo=SLO)
    found = outcome._figures(measured, SLO, DURATION_S)
    for name in outcome.FIGURES:
        assert found[name] == told[name]
    assert found["starved"]
