"""A server of a cluster: it serves what it is given, may fail, and comes back empty."""

import math
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np
import simpy

from adapter_twin.laws import Calibration
from adapter_twin.twin.feed import Feed
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import BASE_MODEL


@dataclass(frozen=True, slots=True)
class Life:
    """A server's work between two starts.

    Attributes
    ----------
    feed : Feed
    requests : list of int
        Numbers in the cluster's trace, in the order in which the server was given them.
    """

    feed: Feed
    requests: list[int]


@dataclass(eq=False)
class Replica:
    """A server in a SimPy environment.

    Attributes
    ----------
    env : simpy.Environment
    index : int
    engine : EngineConfig
    calibration : Calibration
    adapters : frozenset of int
        Those that requests are routed here for; the base model is served everywhere.
    up : bool
    outstanding : int
        Requests given and not complete.
    lives : list of Life
        The last one is going on.
    """

    env: simpy.Environment
    index: int
    engine: EngineConfig
    calibration: Calibration
    adapters: frozenset[int]
    up: bool = False
    outstanding: int = 0
    lives: list[Life] = field(default_factory=list)
    _idle: simpy.Event | None = None

    @property
    def feed(self) -> Feed:
        """The present life's."""
        return self.lives[-1].feed

    def serves(self, adapter: int) -> bool:
        """Return whether requests for an adapter may come here now."""
        return self.up and (adapter == BASE_MODEL or adapter in self.adapters)

    def holds(self, adapter: int) -> bool:
        """Return whether an adapter is in one of the slots."""
        return self.feed.holds(adapter)

    def start(self, feed: Feed) -> None:
        """Begin a new life, with nothing loaded."""
        self.lives.append(Life(feed, []))
        self.up, self._idle, self.outstanding = True, None, 0
        self._process = self.env.process(self._turn_engine_loop(feed))

    def give(self, request: int, arrival_s: float) -> Life:
        """Hand over a request that arrives now; return the life that has it.

        Parameters
        ----------
        request : int
            Number in the cluster's trace.
        arrival_s : float
        """
        self.feed.push(request, arrival_s)
        self.lives[-1].requests.append(request)
        self.outstanding += 1
        if self._idle is not None and not self._idle.triggered:
            self._idle.succeed(arrival_s)
        return self.lives[-1]

    def fail(self) -> list[int]:
        """Stop at once; return the requests that were not complete."""
        self.up = False
        if self._process.is_alive:
            self._process.interrupt()
        life = self.lives[-1]
        end_s = life.feed.session.requests.end_s[: life.feed.pushed]
        return [life.requests[place] for place in np.flatnonzero(np.isnan(end_s))]

    def _turn_engine_loop(self, feed: Feed) -> Generator[simpy.Event, float, None]:
        session, end_s = feed.session, feed.session.front_end.duration_s
        try:
            while True:
                event_s = session.turn()
                self.outstanding = feed.outstanding
                if event_s == math.inf:
                    self._idle = self.env.event()
                    event_s = yield self._idle
                elif event_s > end_s:
                    return
                else:
                    # SimPy adds delays and so rounds; the session's clock holds the exact time.
                    yield self.env.timeout(max(event_s - self.env.now, 0.0))
                session.clock["now_s"] = event_s
        except simpy.Interrupt:
            return
