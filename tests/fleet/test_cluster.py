"""The cluster twin: one replica is the single twin, and no request is lost or served twice."""

from collections.abc import Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.cluster import (
    NOWHERE,
    ClusterRun,
    Failure,
    Move,
    simulate_cluster,
)
from adapter_twin.fleet.hold import check_placement, split_trace
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.routers import (
    AdapterAffinity,
    LeastOutstanding,
    Placed,
    Random,
    RankAware,
    RoundRobin,
    Router,
    least_loaded,
)
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.twin.policies import Policy, UnifiedPool
from adapter_twin.twin.records import Records
from adapter_twin.twin.simulate import draw_requests, simulate
from adapter_twin.workload.adapters import Adapter, deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import BASE_MODEL
from adapter_twin.workload.traffic import Lengths, Workload

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")

LLAMA = "llama-3.1-8b-instruct"
LENGTHS = Lengths(mean_input_tokens=223, mean_output_tokens=200)


@pytest.fixture(scope="module")
def laws() -> Calibration:
    return load_calibration("auto", LLAMA)


def workload(count: int = 12, duration_s: float = 60.0, **changes: Any) -> Workload:
    adapters = deal_adapters(count, [0.6, 0.2], [8, 16])
    return Workload(adapters=adapters, duration_s=duration_s, lengths=LENGTHS, **changes)


def plan(adapters: Sequence[int], slots: int = 4, rank: int = 16) -> ReplicaPlan:
    engine = EngineConfig(
        model=LLAMA, max_loras=slots, max_cpu_loras=max(slots, len(adapters)), max_lora_rank=rank
    )
    return ReplicaPlan(engine, tuple(adapters), (1.0,) * len(adapters))


def everywhere(count: int, replicas: int) -> Placement:
    """Return replicas that all serve all adapters, an equal share each."""
    one = plan(range(count))
    share = ReplicaPlan(one.engine, one.adapters, (1 / replicas,) * count)
    return Placement((share,) * replicas)


def apart(count: int, replicas: int) -> Placement:
    return Placement(tuple(plan(range(k, count, replicas)) for k in range(replicas)))


def assert_same(ours: Records, theirs: Records) -> None:
    for column in fields(Records):
        np.testing.assert_array_equal(
            getattr(ours, column.name), getattr(theirs, column.name), column.name
        )


@pytest.mark.parametrize("slots", [2, 12])
@pytest.mark.parametrize("policy", [Policy(), UnifiedPool()])
@pytest.mark.parametrize("router", [Random(), LeastOutstanding(), AdapterAffinity()])
def test_one_replica_is_the_single_twin(
    laws: Calibration, slots: int, router: Router, policy: Policy
) -> None:
    asked = workload(duration_s=400.0, base_model_request_rate=0.5)
    one = plan(range(12), slots)
    alone = simulate(asked, one.engine, laws, seed=5, policy=policy)
    cluster = simulate_cluster(asked, Placement((one,)), laws, router, seed=5, policy=policy)
    assert len(alone.records) > 1024  # more than a server's room at its start
    assert_same(cluster.records, alone.records)
    assert np.array_equal(np.sort(cluster.gaps[0].gap_s), np.sort(alone.gaps.gap_s))
    assert set(cluster.replica) == {0}


def test_a_placement_is_checked_as_the_cluster_would_serve_it(laws: Calibration) -> None:
    demand = Demand(model=LLAMA, adapters=workload().adapters, lengths=LENGTHS)
    placement = apart(12, 3)
    checked = check_placement(demand, placement, laws, seed=2, duration_s=200.0, jobs=1)
    cluster = simulate_cluster(
        demand.workload(200.0), placement, laws, Placed(), seed=2
    ).by_replica()
    for figure in ("offered_tokens_per_s", "total_throughput", "mean_ttft_ms", "mean_itl_ms"):
        np.testing.assert_allclose(checked[figure], cluster[figure], rtol=1e-12)
    assert checked.serves.tolist() == (~cluster.starved).tolist()


def test_shares_split_an_adapters_requests(laws: Calibration) -> None:
    asked = workload(2, 4000.0)
    one, two = plan([0]), plan([0, 1])
    placement = Placement(
        (ReplicaPlan(one.engine, (0,), (0.25,)), ReplicaPlan(two.engine, (0, 1), (0.75, 1.0)))
    )
    trace = draw_requests(asked, laws)
    replica = split_trace(trace, placement, seed=0)
    assert (replica[trace.adapter == 1] == 1).all()
    assert (replica[trace.adapter == 0] == 0).mean() == pytest.approx(0.25, abs=0.03)


def conserved(run: ClusterRun, requests: int) -> None:
    """Check that every request is complete once, in flight somewhere, or waits for a replica."""
    records = run.records
    assert len(records) == requests
    done = np.isfinite(records.end_s)
    given = run.replica != NOWHERE
    assert not (done & ~given).any()
    assert (records.first_token_s[done] >= records.arrival_s[done]).all()
    assert (records.end_s[done] >= records.first_token_s[done]).all()
    assert (records.scheduled_s[done] >= records.arrival_s[done]).all()
    by_replica = run.by_replica()
    assert by_replica.arrived_requests.sum() == given.sum()
    assert by_replica.completed_requests.sum() == done.sum()


failures = st.lists(
    st.builds(
        Failure,
        replica=st.integers(0, 2),
        at_s=st.floats(0, 50),
        down_s=st.floats(0, 40),
    ),
    max_size=4,
)
homes = st.lists(st.sets(st.integers(0, 11)), min_size=3, max_size=3)


@settings(deadline=None, max_examples=20)
@given(failures, st.lists(st.tuples(st.floats(0, 55), homes), max_size=2), st.integers(0, 3))
def test_no_request_is_lost_by_failures_and_moves(
    laws: Calibration, failed: list[Failure], moved: list[tuple[float, list[set[int]]]], seed: int
) -> None:
    asked = workload(base_model_request_rate=0.3)
    moves = [Move(at_s=at_s, adapters=tuple(map(frozenset, own))) for at_s, own in moved]
    run = simulate_cluster(
        asked, everywhere(12, 3), laws, LeastOutstanding(), seed=seed, failures=failed, moves=moves
    )
    trace = draw_requests(asked, laws, seed=seed)
    conserved(run, len(trace))
    np.testing.assert_array_equal(run.records.arrival_s, trace.arrival_s)
    np.testing.assert_array_equal(run.records.prompt_tokens, trace.prompt_tokens)
    if not failed:
        assert run.retries.max() == 0


def test_what_a_failure_takes_is_served_by_others(laws: Calibration) -> None:
    asked = workload(duration_s=300.0)
    failure = Failure(replica=0, at_s=100.0, down_s=100.0)
    run = simulate_cluster(asked, everywhere(12, 2), laws, RoundRobin(), seed=1, failures=[failure])
    again = run.retries > 0
    assert again.any()
    assert (run.replica[again] == 1).all()
    assert (run.records.scheduled_s[again] >= 100).all()
    first = np.isfinite(run.records.end_s) & (run.replica == 0)
    started = run.records.scheduled_s[first]
    assert not ((started > 100) & (started < 200)).any()
    assert (started >= 200).any()


def test_requests_wait_for_a_replica_that_is_down(laws: Calibration) -> None:
    failure = Failure(replica=0, at_s=10.0, down_s=20.0)
    run = simulate_cluster(
        workload(), Placement((plan(range(12)),)), laws, Random(), failures=[failure]
    )
    late = (run.records.arrival_s > 10) & (run.records.arrival_s < 30)
    assert np.nanmin(run.records.scheduled_s[late]) >= 30
    # back again, it has nothing loaded: the first request of an adapter pays for that
    assert run.records.load_wait_s[run.records.scheduled_s >= 30].max() > 0


def test_never_up_again_is_nowhere(laws: Calibration) -> None:
    failure = Failure(replica=0, at_s=10.0, down_s=1000.0)
    run = simulate_cluster(
        workload(), Placement((plan(range(12)),)), laws, Random(), failures=[failure]
    )
    late = run.records.arrival_s > 10
    assert (run.replica[late] == NOWHERE).all()
    conserved(run, len(run.records))


def test_after_a_move_requests_go_to_the_new_home(laws: Calibration) -> None:
    placement = apart(12, 2)
    swapped = Move(
        at_s=30.0, adapters=tuple(frozenset(p.adapters) for p in placement.replicas)[::-1]
    )
    run = simulate_cluster(workload(), placement, laws, Placed(), moves=[swapped])
    after = run.records.arrival_s >= 30
    odd = run.records.adapter % 2
    assert (run.replica[~after] == odd[~after]).all()
    assert (run.replica[after] == 1 - odd[after]).all()
    conserved(run, len(run.records))


def test_replicas_may_differ_in_engine_and_calibration(laws: Calibration) -> None:
    qwen = load_calibration("auto", "qwen-2.5-7b-instruct")
    one, other = plan(range(6), 2), plan(range(6, 12), 6)
    run = simulate_cluster(workload(), Placement((one, other)), [laws, qwen], Random())
    conserved(run, len(run.records))
    assert [engine.max_loras for engine in run.engines] == [2, 6]


# Routers


def replica(index: int, outstanding: int, held: Sequence[int] = (), rank: int = 16) -> Any:
    return SimpleNamespace(
        index=index,
        outstanding=outstanding,
        engine=SimpleNamespace(max_lora_rank=rank),
        holds=lambda adapter: adapter in held or adapter == BASE_MODEL,
        serves=lambda adapter: True,
    )


def chosen(router: Router, adapter: int, *candidates: Any) -> int:
    return router.route(adapter, candidates, np.random.default_rng(0)).index


def test_round_robin_goes_on_after_the_last_one() -> None:
    router, two = RoundRobin(), (replica(0, 9), replica(2, 0))
    router.start(workload(), everywhere(1, 2))
    assert [chosen(router, 0, *two) for _ in range(4)] == [0, 2, 0, 2]


def test_the_least_loaded_is_the_first_of_several() -> None:
    assert least_loaded([replica(0, 3), replica(1, 1), replica(2, 1)]).index == 1
    assert chosen(LeastOutstanding(), 0, replica(0, 3), replica(1, 1)) == 1


def test_affinity_keeps_to_a_resident_adapter_until_it_is_too_busy() -> None:
    router = AdapterAffinity(tolerance=2.0)
    assert chosen(router, 7, replica(0, 4), replica(1, 9, [7])) == 1
    assert chosen(router, 7, replica(0, 4), replica(1, 10, [7])) == 0
    assert chosen(router, 7, replica(0, 4), replica(1, 3)) == 1


def test_ranks_are_kept_apart_unless_the_narrow_replicas_are_too_busy() -> None:
    router = RankAware(tolerance=2.0)
    only = Adapter(name="a", rank=16, request_rate=1.0)
    router.start(replace(workload(), adapters=(only,)), everywhere(1, 1))
    narrow, fits, wide = replica(0, 0, rank=8), replica(1, 5, rank=16), replica(2, 2, rank=64)
    assert chosen(router, 0, narrow, fits, wide) == 1
    busy = replica(1, 6, rank=16)
    assert chosen(router, 0, narrow, busy, wide) == 2
    assert chosen(router, BASE_MODEL, narrow, fits, wide) == 0


def test_affinity_loads_less_than_blind_routing(laws: Calibration) -> None:
    loads = {}
    for name, router in (("blind", RoundRobin()), ("affine", AdapterAffinity())):
        run = simulate_cluster(workload(duration_s=120.0), everywhere(12, 3), laws, router, seed=1)
        loads[name] = sum(run.adapter_loads)
    assert loads["affine"] < 0.7 * loads["blind"]


# Bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"failures": [Failure(replica=3, at_s=1.0, down_s=1.0)]}, "there is no replica 3"),
        ({"moves": [Move(at_s=1.0, adapters=(frozenset(),))]}, "moves: give the adapters of each"),
    ],
)
def test_what_does_not_fit_the_cluster_is_named(
    laws: Calibration, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(AdapterTwinError, match=words):
        simulate_cluster(workload(), everywhere(12, 2), laws, Random(), **changes)


def test_a_pinned_adapter_is_named(laws: Calibration) -> None:
    asked = workload()
    first, *others = asked.adapters
    pinning = replace(asked, adapters=(replace(first, pinned=True), *others))
    with pytest.raises(AdapterTwinError, match=r"adapter-0: .* leave `pinned` out"):
        simulate_cluster(pinning, everywhere(12, 2), laws, Random())


def test_an_adapter_that_fits_no_slot_is_named(laws: Calibration) -> None:
    narrow = Placement((plan(range(12), rank=8),))
    with pytest.raises(AdapterTwinError, match=r"adapter-1: rank 16 does not fit .* replica 0"):
        simulate_cluster(workload(), narrow, laws, Random())


def test_service_of_a_cluster_counts_what_no_replica_could_take(laws: Calibration) -> None:
    down = [Failure(replica=k, at_s=10.0, down_s=1e3) for k in (0, 1)]
    run = simulate_cluster(workload(), everywhere(12, 2), laws, RoundRobin(), failures=down)
    told, summary = run.service(), run.summary()
    assert (run.replica == NOWHERE).any()
    assert told["arrived_requests"] == len(run.records)
    assert summary["served"] < summary["worst_served"]
    assert summary["mean_ttft_ms"] == told["mean_ttft_ms"]
    assert f"2 replicas, {len(run.records):,} requests" in repr(run)
