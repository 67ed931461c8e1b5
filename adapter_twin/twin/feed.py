"""A session whose requests are not known beforehand: they are pushed as they arrive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.twin.layout import new_requests, state_of_requests
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.session import Session
from adapter_twin.twin.state import PROGRESS, Links, Requests, State
from adapter_twin.twin.wiring import begin, with_defaults
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import BASE_MODEL, Trace


class Feed:
    """The session of one server, and the requests that it has been given.

    A place that no request has taken yet looks to the session like one that never arrives.

    Parameters
    ----------
    engine : EngineConfig
    calibration : Calibration
    adapters : sequence of Adapter
        All that may be asked for; requests name them by their index.
    trace : Trace
        All requests of which it may be given some.
    known : mapping
        Their `adapter_twin.twin.block_pool.pieces`.
    duration_s : float
        End of the run.
    order : numpy.random.Generator
        Draws the order in which the server's steps touch adapters.
    now_s : float
        When the server starts, in s.
    policy : Policy
    room : int
        Places for requests to begin with; they double as needed.

    Attributes
    ----------
    session : Session
    pushed : int
        Requests given so far: the first ones of the session's.
    """

    def __init__(
        self,
        engine: EngineConfig,
        calibration: Calibration,
        adapters: tuple[Adapter, ...],
        trace: Trace,
        known: Mapping[str, NDArray[Any]],
        *,
        duration_s: float,
        order: np.random.Generator,
        now_s: float = 0.0,
        policy: Policy = VLLM,
        room: int = 1024,
    ) -> None:
        for adapter in adapters:
            require(not adapter.pinned, f"{adapter.name}: a cluster pins none; leave `pinned` out")
        longest = int(np.max(trace.prompt_tokens + trace.output_tokens, initial=2))
        output_tokens = int(np.max(trace.output_tokens, initial=1))
        self.session: Session = begin(
            _nothing(room, longest - output_tokens, output_tokens),
            with_defaults(engine, trace, calibration),
            calibration,
            adapters,
            order,
            duration_s=duration_s,
            policy=policy,
        )
        self.session.clock.now_s = now_s
        self.trace, self.pushed = trace, 0
        blocks = self.session.state.blocks
        if blocks is not None:
            self._own_pieces = known["first_piece"], known["last_piece"]
            shared = {name: known[name] for name in ("piece_end", "piece_content")}
            blocks = blocks._replace(pool=blocks.pool._replace(**shared))
            self.session.state = self.session.state._replace(blocks=blocks)

    @property
    def outstanding(self) -> int:
        """Requests given and not complete."""
        clock = self.session.clock
        return int(self.pushed - clock["accepted"] + clock["in_flight"])

    def push(self, request: int, arrival_s: float) -> int:
        """Give the server a request, and return its number here.

        Parameters
        ----------
        request : int
            Number in the trace.
        arrival_s : float
            When it reaches the server, after all that were given before.
        """
        if self.pushed == len(self.session.requests.arrival_s):
            _make_room(self.session)
        requests, blocks, trace = self.session.requests, self.session.state.blocks, self.trace
        place, adapter = self.pushed, trace.adapter[request]
        requests.arrival_s[place] = arrival_s
        requests.adapter[place] = adapter if adapter >= 0 else self.session.limits.base_model
        requests.prompt_tokens[place] = trace.prompt_tokens[request]
        requests.output_tokens[place] = trace.output_tokens[request]
        if blocks is not None:
            first, last = self._own_pieces
            blocks.pool.first_piece[place] = first[request]
            blocks.pool.last_piece[place] = last[request]
        self.pushed += 1
        return place

    def holds(self, adapter: int) -> bool:
        """Return whether an adapter is in a slot; the base model needs none."""
        return adapter < 0 or bool(self.session.state.on_gpu[adapter])


def _nothing(room: int, prompt_tokens: int = 1, output_tokens: int = 1) -> Trace:
    """Return requests that never arrive."""
    return Trace(
        np.full(room, np.inf),
        np.full(room, BASE_MODEL, np.int32),
        np.full(room, prompt_tokens, np.int32),
        np.full(room, output_tokens, np.int32),
    )


def _make_room(session: Session) -> None:
    """Double the places for requests."""
    n = len(session.requests.arrival_s)
    had = session.requests._asdict()
    fresh = new_requests(_nothing(n), session.limits.base_model)._asdict()
    doubled = {name: np.concatenate((had[name], fresh[name])) for name in had}
    session.requests = Requests(**doubled)
    state = session.state._asdict()
    for name, column in state_of_requests(n).items():
        state[name] = np.concatenate((state[name], column))
    for name in ("next", "previous"):
        state[name] = _move_sentinels(state[name], n)
    blocks = session.state.blocks
    if blocks is not None:
        progress, pool = np.concatenate((blocks.progress, np.zeros(n, PROGRESS))), blocks.pool
        own = {
            name: np.resize(getattr(pool, name), 2 * n) for name in ("first_piece", "last_piece")
        }
        state["blocks"] = blocks._replace(
            progress=progress.view(np.recarray), pool=pool._replace(**own)
        )
    session.state = State(**state)


def _move_sentinels(links: Links, n: int) -> Links:
    """Insert `n` nodes, in no list, between the `n` requests and the sentinels behind them."""
    moved = np.where(links >= n, links + n, links)
    fresh = np.arange(n, 2 * n, dtype=np.int32)
    return np.concatenate((moved[:n], fresh, moved[n:])).astype(np.int32)
