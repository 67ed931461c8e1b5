"""A run of the twin, and the compiled clock that drives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.twin import clock as engine_clock
from adapter_twin.twin.clock import STEPS, FrontEnd, Run, StepLaw
from adapter_twin.twin.closed_loop import ClosedLoop
from adapter_twin.twin.compiled import for_arguments
from adapter_twin.twin.policy import Policy
from adapter_twin.twin.state import Limits, Requests, State


@dataclass
class Session:
    """One run of the twin: a policy, and the parts of an `adapter_twin.twin.clock.Run`."""

    limits: Limits
    requests: Requests
    state: State
    clock: Any  # one record of CLOCK
    law: StepLaw
    front_end: FrontEnd
    closed_loop: ClosedLoop | None
    steps: Any  # recarray of STEPS, grown as needed
    pauses: Any  # recarray of PAUSES
    seen: NDArray[np.uint64]
    used: NDArray[np.bool_]
    policy: Policy
    loop: Callable[[Run, Policy], bool] = engine_clock.run_to_end

    def run(self) -> None:
        """Run to the end of the window in the compiled loop."""
        while not self.loop(_run_of(self), self.policy):
            self._grow()
        self._check_slots()

    def turn(self) -> float:
        """Turn the engine loop once; see `adapter_twin.twin.clock.turn`."""
        # fields by name: attributes of a record take ten times as long
        if self.clock["steps"] + 1 >= len(self.steps):
            self._grow()
        event_s = self._turn(_run_of(self), self.policy)
        self._check_slots()
        return event_s

    @cached_property
    def _turn(self) -> Callable[[Run, Policy], float]:
        return for_arguments(engine_clock.turn, (_run_of(self), self.policy))

    def _check_slots(self) -> None:
        require(
            not self.state.count["out_of_slots"],
            "pinned: a batch needs the slot of a pinned adapter that is not in it, at which vLLM "
            "stops; pin fewer adapters or raise max_loras",
        )

    def _grow(self) -> None:
        """Make room for as many steps again."""
        self.steps = np.concatenate((self.steps, table(len(self.steps), STEPS))).view(np.recarray)


_parts = attrgetter(*Run._fields)


def _run_of(session: Session) -> Run:
    return Run._make(_parts(session))


def table(size: int, dtype: Any) -> Any:
    """Return zeroed records with attribute access, in compiled code and out of it."""
    return np.zeros(size, dtype).view(np.recarray)
