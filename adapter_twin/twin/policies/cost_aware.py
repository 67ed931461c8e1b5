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

from dataclasses import dataclass

import numpy as np

from adapter_twin.twin.compiled import helper
from adapter_twin.twin.lists import Links
from adapter_twin.twin.state import COST_AWARE, Rules, State
from adapter_twin.workload.strict import require, require_positive, require_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class CostAware:
    """Evict the idle adapter with the lowest score.

    Parameters
    ----------
    frequency, recency, cost : float
        Weights of the score's terms; only their ratios count. The defaults are Chameleon's as we
        remember them, for its own terms; they were not checked against the paper.
    window_s : float
        Age in seconds at which a use counts half.
    """

    frequency: float = 0.45
    recency: float = 0.1
    cost: float = 0.45
    window_s: float = 300.0

    def __post_init__(self) -> None:
        weights = ("frequency", "recency", "cost")
        for name in weights:
            require_rate(self, name)
        require(any(getattr(self, n) > 0 for n in weights), "frequency: one weight must be above 0")
        require_positive(self, "window_s")

    def rules(self) -> Rules:
        """Return the compiled form."""
        return Rules(
            code=COST_AWARE,
            frequency=float(self.frequency),
            recency=float(self.recency),
            cost=float(self.cost),
            window_s=float(self.window_s),
        )


@helper
def _freshness(state: State, rules: Rules, adapter: int, now_s: float) -> float:
    """Return what is left of a use after the time since the adapter's last one."""
    window_s = rules.window_s
    return float(window_s / (window_s + now_s - state.used_s[adapter]))


@helper
def note_use(state: State, rules: Rules, adapter: int, requests: int, now_s: float) -> None:
    """Count requests admitted (or none, as an adapter becomes idle) and let the others fade."""
    state.uses[adapter] = requests + state.uses[adapter] * _freshness(state, rules, adapter, now_s)
    state.used_s[adapter] = now_s


@helper
def _reload_s(state: State, adapter: int, is_host: bool) -> float:
    return float(state.load_s[adapter] + (state.read_s[adapter] if is_host else 0.0))


@helper
def least_valuable(
    state: State, rules: Rules, following: Links, sentinel: int, is_host: bool, now_s: float
) -> int:
    """Return the member with the lowest score of a list of idle adapters, the oldest of equals."""
    most_uses = longest_s = 0.0
    adapter = following[sentinel]
    while adapter != sentinel:
        uses = state.uses[adapter] * _freshness(state, rules, adapter, now_s)
        most_uses = max(most_uses, uses)
        longest_s = max(longest_s, _reload_s(state, adapter, is_host))
        adapter = following[adapter]
    best, best_score = sentinel, np.inf
    adapter = following[sentinel]
    while adapter != sentinel:
        freshness = _freshness(state, rules, adapter, now_s)
        score = rules.recency * freshness
        if most_uses > 0.0:
            score += rules.frequency * state.uses[adapter] * freshness / most_uses
        if longest_s > 0.0:
            score += rules.cost * _reload_s(state, adapter, is_host) / longest_s
        if score < best_score:
            best, best_score = adapter, score
        adapter = following[adapter]
    return int(best)
