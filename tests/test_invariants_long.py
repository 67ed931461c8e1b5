"""What must hold in every step and of every request, over a million steps of each kind."""

from itertools import count
from typing import Any

import numpy as np
import pytest

from adapter_twin.fleet.cluster import Failure, Move, simulate_cluster
from adapter_twin.fleet.place import place
from adapter_twin.fleet.routers import AdapterAffinity, LeastOutstanding, RoundRobin
from adapter_twin.laws import load_calibration
from adapter_twin.twin.policies import CostAware, Drain, Merge, Policy, UnifiedPool
from adapter_twin.twin.session import Session
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.workload.trace import BASE_MODEL
from study.placement_scenarios import RANK_MIXES, draw_demand
from tests.fleet.test_cluster import LENGTHS, LLAMA, conserved, everywhere, workload
from tests.twin.test_policies import (
    ADAPTERS,
    is_equal_on_both_clocks,
    keeps_to_its_limits,
    play,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is an extrapolation")]

STEPS = 1_000_000
POLICIES = (
    Policy(),
    Drain(max_wait_s=9.0, tolerance=1.2),
    CostAware(frequency=0.1, recency=0.3, cost=1.0, window_s=100.0),
    UnifiedPool(prefetch=True),
    Merge(merge_share=0.6, unmerge_share=0.4),
)


def drawn_case(chance: np.random.Generator, requests: int) -> dict[str, Any]:
    """Draw an engine with any of its limits tight, and requests in bursts or spread out."""
    max_loras, max_num_seqs = chance.integers(1, 5), chance.choice([1, 4, 32, 128])
    prompts, outputs = chance.integers(1, 60, requests), chance.integers(1, 40, requests)
    span_s = requests * chance.choice([0.1, 2.0, 20.0, 60.0])
    arrival_s = np.sort(np.floor(chance.uniform(0, span_s, requests) * 4) / 4)
    block_size = int(chance.choice([1, 5, 16]))
    adapter_blocks = chance.integers(0, 6, ADAPTERS)
    kv_blocks = -(-int((prompts + outputs).max()) // block_size) + int(adapter_blocks.max())
    return {
        "requests": list(
            zip(
                arrival_s.tolist(),
                chance.integers(BASE_MODEL, ADAPTERS, requests).tolist(),
                prompts.tolist(),
                outputs.tolist(),
                strict=True,
            )
        ),
        "max_loras": int(max_loras),
        "max_cpu_loras": int(chance.integers(max_loras, ADAPTERS + 1)),
        "max_num_seqs": int(max_num_seqs),
        "max_num_batched_tokens": int(max_num_seqs + chance.choice([0, 16, 256])),
        "block_size": block_size,
        "kv_cache_tokens": (kv_blocks + int(chance.choice([0, 30, 3000]))) * block_size,
        "adapter_blocks": adapter_blocks.tolist(),
        "load_s": chance.choice([0.0, 0.5, 3.0], ADAPTERS).tolist(),
        "read_s": 1.0,
    }


def first_come_first_served(run: Session) -> None:
    """Check the order within each adapter; who is preempted was scheduled first long ago."""
    for adapter in np.unique(run.requests.adapter):
        of_adapter = run.requests.adapter == adapter
        assert (np.diff(run.requests.scheduled_s[of_adapter]) >= 0).all()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_million_steps_of_an_engine_break_no_invariant(policy: Policy) -> None:
    steps, in_order = 0, 0
    for seed in count():
        case = drawn_case(np.random.default_rng(seed), 10_000)
        run = play(policy=policy, **case)
        keeps_to_its_limits(run, case)
        if not isinstance(policy, Drain) and not run.requests.preemptions.any():
            first_come_first_served(run)
            in_order += 1
        steps += run.clock.steps
        if steps > STEPS:
            break
    assert in_order or isinstance(policy, Drain)
    for seed in range(3):
        is_equal_on_both_clocks(policy, drawn_case(np.random.default_rng(seed), 2_000))


def drawn_failures(chance: np.random.Generator, duration_s: float) -> list[Failure]:
    return [
        Failure(
            replica=int(chance.integers(3)),
            at_s=float(chance.uniform(0, duration_s)),
            down_s=float(down_s),
        )
        for down_s in chance.choice([1.0, 60.0, 600.0], chance.integers(4, 20))
    ]


def drawn_moves(chance: np.random.Generator, duration_s: float) -> list[Move]:
    times_s = np.sort(chance.uniform(0, duration_s, chance.integers(1, 9)))
    homes = chance.random((len(times_s), 3, 12)) < 0.5
    return [
        Move(
            at_s=at_s,
            adapters=tuple(frozenset(np.flatnonzero(own).tolist()) for own in of_replicas),
        )
        for at_s, of_replicas in zip(times_s.tolist(), homes, strict=True)
    ]


def test_a_million_tokens_of_a_cluster_lose_no_request_to_failures_and_moves() -> None:
    laws, tokens, retried = load_calibration("auto", LLAMA), 0, 0
    routers = (RoundRobin(), LeastOutstanding(), AdapterAffinity())
    for seed in count():
        chance = np.random.default_rng(seed)
        asked = workload(duration_s=2000.0, base_model_request_rate=0.3)
        run = simulate_cluster(
            asked,
            everywhere(12, 3),
            laws,
            routers[seed % 3],
            seed=seed,
            failures=drawn_failures(chance, 2000.0),
            moves=drawn_moves(chance, 2000.0),
        )
        trace = draw_requests(asked, laws, seed=seed)
        conserved(run, len(trace))
        np.testing.assert_array_equal(run.records.arrival_s, trace.arrival_s)
        np.testing.assert_array_equal(run.records.prompt_tokens, trace.prompt_tokens)
        done = np.isfinite(run.records.end_s)
        tokens += int(run.records.output_tokens[done].sum())
        retried += int(run.retries.sum())
        if tokens > STEPS:
            break
    assert retried > 100


@pytest.mark.parametrize("seed", range(4))
def test_every_adapter_of_a_placement_is_whole_and_every_gpu_within_its_limits(seed: int) -> None:
    chance = np.random.default_rng(seed)
    ranks = chance.choice(list(RANK_MIXES))
    adapters, gpus = int(chance.integers(10, 60)), float(chance.uniform(0.3, 1.2))
    exponent = float(chance.uniform(0, 1.5))
    demand = draw_demand(chance, adapters, gpus, exponent, ranks, LENGTHS)
    answer, placement = place(demand, replicate_above=0.5, jobs=1)
    whole = np.zeros(adapters)
    for plan in placement.replicas:
        np.add.at(whole, [*plan.adapters], plan.shares)
        assert len(set(plan.adapters)) == len(plan.adapters) <= plan.engine.max_cpu_loras
        widest = max(demand.adapters[adapter].rank for adapter in plan.adapters)
        assert widest <= plan.engine.max_lora_rank
        assert plan.engine.max_loras <= plan.engine.max_cpu_loras
    np.testing.assert_allclose(whole, 1.0, atol=1e-9)
    assert answer["lower_bound"] <= answer["gpus"] == len(placement.replicas)
    assert all(replica["kv_cache_tokens"] > 0 for replica in answer["replicas"])
