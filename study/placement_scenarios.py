"""Demands to compare placements on: drawn at random, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice, product

import numpy as np

from adapter_twin.plan.demand import Demand
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Lengths

MODEL = "llama-3.1-8b-instruct"
SCENARIOS = 36

RANK_MIXES: dict[str, dict[int, float]] = {
    "equal": {8: 1.0},
    "narrow": {8: 0.5, 16: 0.5},
    "even": {8: 0.25, 16: 0.25, 32: 0.25, 64: 0.25},
    "skewed": {8: 0.75, 16: 0.2, 64: 0.05},
}
"""Mixes give ranks and their shares; `skewed` has few that make the slots of a GPU wide."""

EXPONENTS = (0.0, 0.5, 0.9, 1.2, 1.5)
"""Zipf's law of popularity has these exponents."""

COUNTS = (50, 2000)
GPUS = (2.0, 60.0)
"""Demands have adapters, and GPUs that the load would fill at no cost of adapters, within these."""

GPU_TOKENS_PER_S = 17_000.0
"""One GPU serves roughly this of a small number of adapters."""

LENGTHS = ((250, 231), (120, 350), (600, 150))
"""Prompts and outputs have these means, in tokens."""

SLOS = (None, None, Slo(ttft_ms=2000.0), Slo(ttft_ms=5000.0, itl_ms=60.0))

SKEWED = 0.9
"""Popularity is called skewed from this exponent on."""


@dataclass(frozen=True, slots=True)
class PlacementScenario:
    """A demand and what it was drawn from.

    Attributes
    ----------
    name, ranks : str
    zipf_exponent : float
    demand : Demand
    """

    name: str
    ranks: str
    zipf_exponent: float
    demand: Demand

    @property
    def skewed(self) -> bool:
        """True where few adapters have most requests, or few have wide ranks."""
        return self.zipf_exponent >= SKEWED or self.ranks == "skewed"


def scenarios(count: int = SCENARIOS, seed: int = 0) -> Iterator[PlacementScenario]:
    """Yield scenarios: every pair of popularity and rank mix in turn, the rest at random.

    Numbers of adapters and loads are log-uniform in `COUNTS` and `GPUS`. The order of adapters
    tells nothing about their load or rank.
    """
    kinds = islice(cycle(product(EXPONENTS, RANK_MIXES)), count)
    for number, (exponent, ranks) in enumerate(kinds):
        rng = np.random.default_rng([seed, number])
        adapters = round(_log_uniform(rng, COUNTS))
        gpus = _log_uniform(rng, GPUS)
        prompt, output = LENGTHS[rng.integers(len(LENGTHS))]
        slo = SLOS[rng.integers(len(SLOS))]
        demand = draw_demand(
            rng,
            adapters,
            gpus,
            exponent,
            ranks,
            Lengths(mean_input_tokens=prompt, mean_output_tokens=output),
            slo,
        )
        name = f"{number:02d} {adapters} adapters, {gpus:.1f} GPUs"
        yield PlacementScenario(name, ranks, exponent, demand)


def draw_demand(
    rng: np.random.Generator,
    adapters: int,
    gpus: float,
    zipf_exponent: float,
    ranks: str,
    lengths: Lengths,
    slo: Slo | None = None,
) -> Demand:
    """Return a demand whose load would fill n GPUs.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the ranks and the order.
    adapters : int
    gpus : float
        In units of `GPU_TOKENS_PER_S`.
    zipf_exponent : float
    ranks : str
        One of `RANK_MIXES`.
    lengths : Lengths
    slo : Slo, optional
    """
    weights = np.arange(1, adapters + 1) ** -zipf_exponent
    tokens = lengths.mean_input_tokens + lengths.mean_output_tokens
    rates = rng.permutation(weights) / weights.sum() * gpus * GPU_TOKENS_PER_S / tokens
    mix = RANK_MIXES[ranks]
    drawn = rng.choice(list(mix), adapters, p=list(mix.values()))
    return Demand(
        model=MODEL,
        adapters=tuple(
            Adapter(name=f"adapter-{i}", rank=int(rank), request_rate=float(rate))
            for i, (rank, rate) in enumerate(zip(drawn, rates, strict=True))
        ),
        lengths=lengths,
        slo=slo,
    )


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(*np.log(limits))))
