"""The twin as a SimPy process: one step at a time, so that other processes can act in between."""

from __future__ import annotations

from collections.abc import Generator

import simpy

from adapter_twin.twin.session import Session


class EngineLoop:
    """One replica in a SimPy environment.

    Parameters
    ----------
    env : simpy.Environment
    session : Session
        The run to drive; it ends where the compiled loop would have left it.

    Attributes
    ----------
    process : simpy.Process
        Ends with the window.
    """

    def __init__(self, env: simpy.Environment, session: Session) -> None:
        self.env = env
        self.session = session
        self.process = env.process(self._turn_engine_loop())

    def _turn_engine_loop(self) -> Generator[simpy.Event, None, None]:
        session = self.session
        while (event_s := session.turn()) <= session.front_end.duration_s:
            # SimPy adds delays and so rounds; the session's clock holds the exact time.
            yield self.env.timeout(max(event_s - self.env.now, 0.0))
            session.clock["now_s"] = event_s


def run_in_simpy(session: Session) -> None:
    """Run a session to the end of its window under SimPy."""
    env = simpy.Environment()
    EngineLoop(env, session)
    env.run()
