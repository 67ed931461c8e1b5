"""A session whose requests are not known beforehand: they are pushed as they arrive."""

from __future__ import annotations

import numpy as np

from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.session import Session, new_requests, state_of_requests
from adapter_twin.twin.state import PROGRESS, Links, Requests, State
from adapter_twin.twin.wiring import begin
from adapter_twin.workload.scenario import Adapter, EngineConfig
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
    duration_s : float
        End of the run.
    longest_output : int
        Most output tokens of any request.
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
        *,
        duration_s: float,
        longest_output: int,
        order: np.random.Generator,
        now_s: float = 0.0,
        policy: Policy = VLLM,
        room: int = 1024,
    ) -> None:
        for adapter in adapters:
            require(not adapter.pinned, f"{adapter.name}: a cluster pins none; leave `pinned` out")
        require(
            not engine.enable_prefix_caching,
            "enable_prefix_caching: a cluster's servers cannot keep prefixes; turn it off",
        )
        nothing = _nothing(room, longest_output)
        self.session: Session = begin(
            nothing, engine, calibration, adapters, order, duration_s=duration_s, policy=policy
        )
        self.session.clock.now_s = now_s
        self.pushed = 0

    @property
    def outstanding(self) -> int:
        """Requests given and not complete."""
        clock = self.session.clock
        return int(self.pushed - clock["accepted"] + clock["in_flight"])

    def push(self, arrival_s: float, adapter: int, prompt_tokens: int, output_tokens: int) -> int:
        """Give the server a request, and return its number here.

        Parameters
        ----------
        arrival_s : float
            When it reaches the server, after all that were given before.
        adapter : int
            -1 is the base model.
        prompt_tokens, output_tokens : int
        """
        requests = self.session.requests
        if self.pushed == len(requests.arrival_s):
            _make_room(self.session)
            requests = self.session.requests
        place = self.pushed
        requests.arrival_s[place] = arrival_s
        requests.adapter[place] = adapter if adapter >= 0 else self.session.limits.base_model
        requests.prompt_tokens[place] = prompt_tokens
        requests.output_tokens[place] = output_tokens
        self.pushed += 1
        return place

    def holds(self, adapter: int) -> bool:
        """Return whether an adapter is in a slot; the base model needs none."""
        return adapter < 0 or bool(self.session.state.on_gpu[adapter])


def _nothing(room: int, output_tokens: int) -> Trace:
    """Return requests that never arrive."""
    return Trace(
        np.full(room, np.inf),
        np.full(room, BASE_MODEL, np.int32),
        np.ones(room, np.int32),
        np.full(room, output_tokens, np.int32),
    )


def _make_room(session: Session) -> None:
    """Double the places for requests."""
    n = len(session.requests.arrival_s)
    had = session.requests._asdict()
    fresh = new_requests(_nothing(n, 1), session.limits.base_model)._asdict()
    doubled = {name: np.concatenate((had[name], fresh[name])) for name in had}
    session.requests = Requests(**doubled)
    state = session.state._asdict()
    for name, column in state_of_requests(n).items():
        state[name] = np.concatenate((state[name], column))
    for name in ("next", "previous"):
        state[name] = _move_sentinels(state[name], n)
    blocks = session.state.blocks
    if blocks is not None:
        progress = np.concatenate((blocks.progress, np.zeros(n, PROGRESS)))
        state["blocks"] = blocks._replace(progress=progress.view(np.recarray))
    session.state = State(**state)


def _move_sentinels(links: Links, n: int) -> Links:
    """Insert `n` nodes, in no list, between the `n` requests and the sentinels behind them."""
    moved = np.where(links >= n, links + n, links)
    fresh = np.arange(n, 2 * n, dtype=np.int32)
    return np.concatenate((moved[:n], fresh, moved[n:])).astype(np.int32)
