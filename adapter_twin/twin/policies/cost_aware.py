"""Cost-aware eviction: the least valuable idle adapter leaves, not the least recently used.

As Chameleon (Iliakopoulou et al., MICRO 2025, arXiv 2411.17741), whose adapter cache evicts the
adapter with the lowest weighted sum of frequency, recency and size. Here both caches do, the GPU
slots and the host memory. Chameleon takes the size because its reload time grows with it; the twin
knows the reload time itself, so that takes the size's place. Chameleon's scheduler, and its cache
that grows and shrinks with the free memory, are not imitated.

Each term lies between 0 and 1: requests admitted for the adapter, faded with their age, over the
highest among the idle ones; ``1 / (1 + idle time / window_s)``; and the time to bring it back over
the highest among the idle ones. With only the recency's weight above zero the least recently used
idle adapter leaves: vLLM's rule without its chain of evictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from adapter_twin.errors import require
from adapter_twin.twin.compiled import helper
from adapter_twin.twin.residency import LoadsAtAdmission, become_idle
from adapter_twin.twin.state import Limits, Links, State
from adapter_twin.workload.strict import NotNegative, Positive, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostAware(LoadsAtAdmission):
    """Evict the idle adapter with the lowest score.

    Parameters
    ----------
    frequency, recency, cost : float
        Weights of the score's terms; only their ratios count. The defaults are Chameleon's as we
        remember them, for its own terms; they were not checked against the paper.
    window_s : float
        Age in seconds at which a use counts half.
    """

    frequency: NotNegative = 0.45
    recency: NotNegative = 0.1
    cost: NotNegative = 0.45
    window_s: Positive = 300.0

    # requests admitted, faded until `used_s`
    adapter_notes: ClassVar[Mapping[str, float]] = {"uses": 0.0, "used_s": 0.0}

    def __post_init__(self) -> None:
        weight = self.frequency + self.recency + self.cost
        require(weight > 0, "frequency: one weight must be above 0")

    def admit(self, state: State, adapter: int, now_s: float) -> None:
        """Count a use, and let the others fade."""
        _note_use(state, self.window_s, adapter, 1, now_s)

    def leave(self, limits: Limits, state: State, adapter: int, now_s: float) -> None:
        """Let the uses fade until now, when the adapter becomes idle."""
        _note_use(state, self.window_s, adapter, 0, now_s)
        become_idle(limits, state, adapter)

    def victim(
        self, limits: Limits, state: State, following: Links, is_host: bool, now_s: float
    ) -> int:
        """Return the idle adapter with the lowest score, the oldest of equals."""
        sentinel = limits.base_model + 1
        most_uses = longest_s = 0.0
        adapter = following[sentinel]
        while adapter != sentinel:
            uses = state.adapter_notes[adapter].uses * _freshness(
                state, self.window_s, adapter, now_s
            )
            most_uses = max(most_uses, uses)
            longest_s = max(longest_s, _reload_s(state, adapter, is_host))
            adapter = following[adapter]
        best, best_score = sentinel, np.inf
        adapter = following[sentinel]
        while adapter != sentinel:
            freshness = _freshness(state, self.window_s, adapter, now_s)
            score = self.recency * freshness
            if most_uses > 0.0:
                score += self.frequency * state.adapter_notes[adapter].uses * freshness / most_uses
            if longest_s > 0.0:
                score += self.cost * _reload_s(state, adapter, is_host) / longest_s
            if score < best_score:
                best, best_score = adapter, score
            adapter = following[adapter]
        return int(best)


@helper
def _freshness(state: State, window_s: float, adapter: int, now_s: float) -> float:
    """Return what is left of a use after the time since the adapter's last one."""
    return float(window_s / (window_s + now_s - state.adapter_notes[adapter].used_s))


@helper
def _note_use(state: State, window_s: float, adapter: int, requests: int, now_s: float) -> None:
    note = state.adapter_notes[adapter]
    note.uses = requests + note.uses * _freshness(state, window_s, adapter, now_s)
    note.used_s = now_s


@helper
def _reload_s(state: State, adapter: int, is_host: bool) -> float:
    return float(state.load_s[adapter] + (state.read_s[adapter] if is_host else 0.0))
