"""The cluster twin: replicas behind a router in SimPy, their failures, and moves of adapters.

Each replica is the very server of `adapter_twin.twin`, one step at a time. A cluster of one replica
gives the records of `adapter_twin.twin.simulate.simulate`, bit for bit.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import simpy
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.fleet.cluster_replica import Life, Replica
from adapter_twin.fleet.placement import Placement
from adapter_twin.fleet.routers import Router
from adapter_twin.laws import Calibration
from adapter_twin.service.metrics import Service, service
from adapter_twin.twin.block_pool import pieces
from adapter_twin.twin.feed import Feed
from adapter_twin.twin.layout import check_lengths
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.records import Gaps, Records, make_gaps, make_records
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.trace import Trace, generators
from adapter_twin.workload.traffic import Workload

NOWHERE = -1
"""A request that no replica was up for has this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica stops at once and comes back empty.

    Attributes
    ----------
    replica : int
    at_s, down_s : float
        Time of the failure, and time until a new server answers.
    """

    replica: int
    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """New homes for adapters, while serving.

    From then on requests go to the new homes, which read an adapter at its first use; what the old
    homes have been given they serve to its end.

    Attributes
    ----------
    at_s : float
    adapters : tuple of frozenset of int
        Those of each replica from then on.
    """

    at_s: float
    adapters: tuple[frozenset[int], ...]


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """A simulated run of a cluster.

    Attributes
    ----------
    records : Records
        Of all requests, in order of arrival. Of a request that was given out again, arrival is the
        first one, and all else is of the last server that it was given to.
    replica : int32, shape (requests,)
        That server, or `NOWHERE`.
    retries : int32, shape (requests,)
        Failures that took it.
    gaps : list of Gaps
        Inter-token gaps, by replica.
    adapter_loads : list of int
        Copies of adapters into slots, by replica.
    engines : tuple of EngineConfig
    duration_s : float
    """

    records: Records
    replica: NDArray[np.int32]
    retries: NDArray[np.int32]
    gaps: list[Gaps]
    adapter_loads: list[int]
    engines: tuple[EngineConfig, ...]
    duration_s: float

    def service(self, *, slo: Slo | None = None, adapters: Sequence[Adapter] = ()) -> Service:
        """Return `adapter_twin.service.metrics.service` of the whole cluster."""
        gaps = _joined(self.gaps)
        return service(self.records, gaps, self.duration_s, slo=slo, adapters=adapters)

    def summary(self) -> dict[str, float]:
        """Return the service in four figures.

        Returns
        -------
        dict
            ``served``, percent of the offered tokens, and ``worst_served``, of the replica that
            served the least of what it was given; ``mean_ttft_ms`` and ``p99_ttft_ms``.
        """
        whole, by_replica = self.service(), self.by_replica()
        share = by_replica.total_throughput / by_replica.offered_tokens_per_s
        return {
            "served": 100 * whole["total_throughput"] / whole["offered_tokens_per_s"],
            "worst_served": 100 * float(share.min()),
            "mean_ttft_ms": whole["mean_ttft_ms"],
            "p99_ttft_ms": whole["p99_ttft_ms"],
        }

    def by_replica(self) -> pd.DataFrame:
        """Return each replica's load and service.

        Returns
        -------
        pandas.DataFrame
            ``replica``, and `adapter_twin.service.metrics.service` of what it was given.
        """
        own = [self.records[self.replica == index] for index in range(len(self.engines))]
        told = map(service, own, self.gaps, [self.duration_s] * len(own))
        return pd.DataFrame({"replica": index, **each} for index, each in enumerate(told))

    def __repr__(self) -> str:
        done = int(np.isfinite(self.records.end_s).sum())
        return (
            f"ClusterRun of {self.duration_s:g} s: {len(self.engines)} replicas, "
            f"{len(self.records):,} requests, {done:,} completed"
        )


def simulate_cluster(
    workload: Workload,
    placement: Placement,
    calibrations: Calibration | Sequence[Calibration],
    router: Router,
    *,
    seed: int = 0,
    failures: Sequence[Failure] = (),
    moves: Sequence[Move] = (),
    trace: Trace | None = None,
    policy: Policy = VLLM,
) -> ClusterRun:
    """Predict how a cluster serves a workload.

    Parameters
    ----------
    workload : Workload
        Of the whole cluster; requests to the base model may go to every replica.
    placement : Placement
        Engines, and the adapters that are routed to each.
    calibrations : Calibration or sequence of Calibration
        One for all replicas, or one for each.
    router : Router
        See `adapter_twin.fleet.routers`.
    seed : int
        Of the traffic, and of the router's chance.
    failures : sequence of Failure
        Requests that a failure takes are given out again at once, and start from scratch.
    moves : sequence of Move
    trace : Trace, optional
        What `adapter_twin.twin.simulate.draw_requests` returns, where clusters share requests.
    policy : Policy
        Of every replica.

    Returns
    -------
    ClusterRun

    Raises
    ------
    AdapterTwinError
        An engine would not start, an adapter does not fit its slots, or a failure or move names no
        replica.
    """
    engines = tuple(plan.engine for plan in placement.replicas)
    if isinstance(calibrations, Calibration):
        calibrations = [calibrations] * len(engines)
    if trace is None:
        trace = draw_requests(workload, calibrations[0], seed=seed)
    cluster = Cluster(workload, placement, calibrations, router, trace, seed, policy)
    for failure in failures:
        require(
            0 <= failure.replica < len(engines),
            f"failures: there is no replica {failure.replica}; the last one is {len(engines) - 1}",
        )
        cluster.env.process(cluster.fail(failure))
    for move in moves:
        require(len(move.adapters) == len(engines), "moves: give the adapters of each replica")
        cluster.env.process(cluster.move(move))
    cluster.env.process(cluster.receive())
    cluster.env.run()
    return cluster.result()


@dataclass(eq=False)
class Cluster:
    """The state of one run of `simulate_cluster`, whose arguments it takes."""

    workload: Workload
    placement: Placement
    calibrations: Sequence[Calibration]
    router: Router
    trace: Trace
    seed: int
    policy: Policy

    def __post_init__(self) -> None:
        require(
            not self.trace.waits
            and self.workload.samples == 1
            and self.workload.arrivals.num_prompts is None,
            "sessions, samples, num_prompts, max_concurrency: for one engine only; leave them out",
        )
        self.router.start(self.workload, self.placement)
        self.env = simpy.Environment()
        self.pieces = pieces(self.trace)
        self.rng = np.random.default_rng([self.seed, 1])
        *_, self.order = generators(self.seed)
        self.retries = np.zeros(len(self.trace), np.int32)
        self.backlog: deque[int] = deque()
        self.given_to: list[Life | None] = [None] * len(self.trace)
        self._candidates: dict[int, list[Replica]] = {}  # by adapter, until something changes
        self.replicas = list[Replica]()
        plans = zip(self.placement.replicas, self.calibrations, strict=True)
        for index, (plan, laws) in enumerate(plans):
            served = frozenset(plan.adapters)
            self._check(index, plan.engine, served)
            feed = self._feed(plan.engine, laws)
            tokens = laws.require_start(plan.engine, slots=self.policy.reserves_slots)
            check_lengths(self.trace, plan.engine, tokens, feed.session.state.adapter_blocks)
            lengths = self.trace.prompt_tokens + self.trace.output_tokens
            longest, most = int(lengths.max(initial=1)), laws.memory.max_model_len(plan.engine)
            require(
                longest <= most,
                f"lengths: a request of {longest} tokens is longer than max_model_len = {most}; "
                "shorten the requests or raise it",
            )
            self.replicas.append(Replica(self.env, index, plan.engine, laws, served))
            self.replicas[-1].start(feed)

    def _feed(self, engine: EngineConfig, calibration: Calibration) -> Feed:
        return Feed(
            engine,
            calibration,
            self.workload.adapters,
            self.trace,
            self.pieces,
            duration_s=self.workload.duration_s,
            order=self.order,
            now_s=float(self.env.now),
            policy=self.policy,
        )

    def _check(self, index: int, engine: EngineConfig, adapters: frozenset[int]) -> None:
        for adapter in adapters:
            known = self.workload.adapters[adapter]
            require(
                known.rank <= engine.max_lora_rank,
                f"{known.name}: rank {known.rank} does not fit the slots of replica {index}, "
                f"max_lora_rank = {engine.max_lora_rank}",
            )

    def receive(self) -> Generator[simpy.Event, None, None]:
        """Let the requests arrive."""
        for request, arrival_s in enumerate(self.trace.arrival_s.tolist()):
            yield self.env.timeout(max(arrival_s - self.env.now, 0.0))
            self._dispatch(request, arrival_s)

    def _dispatch(self, request: int, arrival_s: float | None = None) -> None:
        """Give a request to a replica, or let it wait until one is up."""
        adapter = int(self.trace.adapter[request])
        if adapter not in self._candidates:
            self._candidates[adapter] = [r for r in self.replicas if r.serves(adapter)]
        candidates = self._candidates[adapter]
        if not candidates:
            self.backlog.append(request)
            return
        replica = self.router.route(adapter, candidates, self.rng)
        now_s = float(self.env.now) if arrival_s is None else arrival_s
        self.given_to[request] = replica.give(request, now_s)

    def _dispatch_backlog(self) -> None:
        for _ in range(len(self.backlog)):
            self._dispatch(self.backlog.popleft())

    def fail(self, failure: Failure) -> Generator[simpy.Event, None, None]:
        """Take a replica down, give its requests to others, and bring it back."""
        yield self.env.timeout(failure.at_s)
        replica = self.replicas[failure.replica]
        if not replica.up or self.env.now >= self.workload.duration_s:
            return
        lost = replica.fail()
        self._candidates.clear()
        for request in lost:
            self.retries[request] += 1
            self._dispatch(request)
        yield self.env.timeout(failure.down_s)
        if self.env.now >= self.workload.duration_s:
            return
        replica.start(self._feed(replica.engine, replica.calibration))
        self._candidates.clear()
        self._dispatch_backlog()

    def move(self, move: Move) -> Generator[simpy.Event, None, None]:
        """Route adapters to their new homes."""
        yield self.env.timeout(move.at_s)
        for replica, adapters in zip(self.replicas, move.adapters, strict=True):
            self._check(replica.index, replica.engine, adapters)
            replica.adapters = adapters
        self._candidates.clear()
        self._dispatch_backlog()

    def result(self) -> ClusterRun:
        """Collect what all lives of all replicas have recorded."""
        trace, n = self.trace, len(self.trace)
        records = Records(
            arrival_s=trace.arrival_s,
            adapter=trace.adapter.astype(np.int32),
            prompt_tokens=trace.prompt_tokens.astype(np.int32),
            output_tokens=trace.output_tokens.astype(np.int32),
            scheduled_s=np.full(n, np.nan),
            first_token_s=np.full(n, np.nan),
            end_s=np.full(n, np.nan),
            preemptions=np.zeros(n, np.int32),
            load_wait_s=np.zeros(n),
            rejected=np.zeros(n, bool),
            refused=np.zeros(n, bool),
            cached_tokens=np.full(n, -1, np.int32),
        )
        server = np.full(n, NOWHERE, np.int32)
        for replica in self.replicas:
            for life in replica.lives:
                recorded = make_records(life.feed.session, replica.calibration.front_end.overhead_s)
                places = [i for i, r in enumerate(life.requests) if self.given_to[r] is life]
                own = np.array(life.requests, np.int64)[places]
                for column in fields(Records)[1:]:
                    getattr(records, column.name)[own] = getattr(recorded, column.name)[places]
                server[own] = replica.index
        sessions = [[life.feed.session for life in replica.lives] for replica in self.replicas]
        return ClusterRun(
            records,
            server,
            self.retries,
            [_joined(list(map(make_gaps, own))) for own in sessions],
            [sum(int(session.steps.loads.sum()) for session in own) for own in sessions],
            tuple(replica.engine for replica in self.replicas),
            self.workload.duration_s,
        )


def _joined(gaps: Sequence[Gaps]) -> Gaps:
    columns = zip(*((some.gap_s, some.count, some.end_s) for some in gaps), strict=True)
    return Gaps(*map(np.concatenate, columns))
