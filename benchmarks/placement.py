"""Placements of many demands against the proven bound: ``python -m benchmarks.placement``.

GPUs by method for each scenario of `adapter_twin.fleet.scenarios`; then small demands, of which the
mixed-integer program knows the fewest GPUs; then one of 10,000 adapters. The oracle accepts every
GPU that is counted. Seconds are wall-clock on one core.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from adapter_twin.config import Lengths, Slo
from adapter_twin.fleet.baselines import (
    average_adapters,
    first_fit_by_count,
    round_robin,
    starving,
)
from adapter_twin.fleet.bound import certificate, lower_bound
from adapter_twin.fleet.capacity import Oracle
from adapter_twin.fleet.envelope import levels_of
from adapter_twin.fleet.exact import fewest_gpus
from adapter_twin.fleet.greedy import (
    Groups,
    best_greedy,
    first_fit_decreasing,
    grouped_by_rank,
)
from adapter_twin.fleet.local_search import improve
from adapter_twin.fleet.scenarios import (
    SCENARIOS,
    PlacementScenario,
    draw_demand,
    scenarios,
)

METHODS: dict[str, Callable[[Oracle], Groups]] = {
    "first_fit": first_fit_decreasing,
    "by_rank": lambda oracle: grouped_by_rank(oracle, fill_gaps=False),
    "gaps_filled": lambda oracle: grouped_by_rank(oracle, fill_gaps=True),
    "round_robin": round_robin,
    "by_count": first_fit_by_count,
}
GREEDY = ("first_fit", "by_rank", "gaps_filled")
GAP_BAR, SAVED_BAR = 0.05, 0.4
LENGTHS = Lengths(mean_input_tokens=250, mean_output_tokens=231)
SMALL, SMALL_ADAPTERS = 12, 10
LARGE = (("even", None), ("skewed", Slo(ttft_ms=2000.0)))


def timed(work: Callable[[], Groups]) -> tuple[Groups, float]:
    start = time.perf_counter()
    groups = work()
    return groups, time.perf_counter() - start


def compare(scenario: PlacementScenario, tries: int) -> dict[str, object]:
    """Return GPUs by method, the bound, and seconds."""
    demand = scenario.demand
    start = time.perf_counter()
    oracle = Oracle(demand)
    row: dict[str, object] = {
        "scenario": scenario.name,
        "zipf": scenario.zipf_exponent,
        "ranks": scenario.ranks,
        "slo": "" if demand.slo is None else f"{demand.slo.ttft_ms}/{demand.slo.itl_ms}",
        "split": len(oracle.parts) > len(demand.adapters),
        "skewed": scenario.skewed,
        "oracle_s": time.perf_counter() - start,
    }
    placed: dict[str, Groups] = {}
    for name, method in METHODS.items():
        oracle.forget()  # so that none profits from what another one asked
        placed[name], row[f"{name}_s"] = timed(partial(method, oracle))
        assert starving(oracle, placed[name]) == 0
    best = min((placed[name] for name in GREEDY), key=len)
    start = time.perf_counter()
    proven = certificate(oracle, levels_of(oracle))
    prices = proven.prices(oracle.parts.rate, oracle.parts.rank)
    bound = max(int(np.ceil(prices.sum() - 1e-6)), 1)
    row["bound_s"] = time.perf_counter() - start
    searched, row["search_s"] = timed(
        lambda: improve(oracle, best, prices, enough=bound, tries=tries)
    )
    assert starving(oracle, searched) == 0
    assert bound <= len(searched) <= len(best)
    oracle.place(searched)
    blind = average_adapters(oracle)
    count = len(oracle.parts)
    blocks = [list(range(i, min(i + blind, count))) for i in range(0, count, blind)]
    row |= {name: len(groups) for name, groups in placed.items()}
    return row | {
        "best_greedy": len(best),
        "search": len(searched),
        "bound": bound,
        "price_sum": float(prices.sum()),
        "gap": len(searched) / bound - 1,
        # of GPUs filled as if all adapters were average, before fewer are put on each
        "by_count_starving": starving(oracle, blocks) / len(blocks),
    }


def small(seed: int) -> Iterator[dict[str, object]]:
    """Yield demands of which the fewest GPUs are known."""
    for number in range(SMALL):
        rng = np.random.default_rng([seed, number])
        slo = Slo(ttft_ms=2000.0) if number % 2 else None
        gpus = float(rng.uniform(2, 5))
        demand = draw_demand(rng, SMALL_ADAPTERS, gpus, 0.7, "skewed", LENGTHS, slo)
        oracle = Oracle(demand)
        start = time.perf_counter()
        exact = fewest_gpus(oracle)
        yield {
            "demand": number,
            "parts": len(oracle.parts),
            "fewest": len(exact.groups),
            "optimal": exact.optimal,
            "seconds": time.perf_counter() - start,
            "best_greedy": len(best_greedy(oracle)),
            "bound": lower_bound(oracle),
        }


def large(seed: int) -> Iterator[dict[str, object]]:
    """Yield placements of 10,000 adapters."""
    for ranks, slo in LARGE:
        rng = np.random.default_rng(seed)
        demand = draw_demand(rng, 10_000, 300.0, 0.9, ranks, LENGTHS, slo)
        oracle, row = Oracle(demand), {"ranks": ranks, "slo": slo is not None}
        for name in GREEDY:
            oracle.forget()
            groups, seconds = timed(partial(METHODS[name], oracle))
            row |= {name: len(groups), f"{name}_s": seconds}
        start = time.perf_counter()
        yield row | {"bound": lower_bound(oracle), "bound_s": time.perf_counter() - start}


def summarise(table: pd.DataFrame) -> dict[str, object]:
    """Return mean gaps and what is saved, in all scenarios and in kinds of them."""
    kinds = {
        "all": table.bound > 0,
        "slo": table.slo != "",
        "no slo": table.slo == "",
        "bound of 10 GPUs or more": table.bound >= 10,
        "skewed": table.skewed,
        "skewed, none split": table.skewed & ~table.split,
        "skewed ranks, even popularity": (table.ranks == "skewed") & (table.zipf < 0.9),
    }
    return {
        name: {
            "scenarios": len(rows),
            "gap_mean": float(rows.gap.mean()),
            "gap_of_total": float(rows.search.sum() / rows.bound.sum() - 1),
            "at_bound": int((rows.search == rows.bound).sum()),
            "one_above": int((rows.search == rows.bound + 1).sum()),
            "saved_on_round_robin": float(1 - (rows.search / rows.round_robin).mean()),
            "saved_on_by_count": float(1 - (rows.search / rows.by_count).mean()),
            "saved_least": float(
                1 - (rows.search / rows[["round_robin", "by_count"]].min(axis=1)).max()
            ),
        }
        for name, which in kinds.items()
        if len(rows := table[which])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pd.set_option("display.width", 250, "display.max_columns", 40, "display.max_rows", 200)
    drawn = scenarios(options.scenarios, options.seed)
    rows = []
    for scenario in drawn:
        rows.append(compare(scenario, options.tries))
        print(f"{scenario.name}: {rows[-1]['search']} GPUs, bound {rows[-1]['bound']}", flush=True)
    table = pd.DataFrame(rows)
    print(table.drop(columns=["skewed"]).round(2).to_string(index=False))
    figures = {
        "machine": platform.processor() or platform.machine(),
        "bars": {"gap": GAP_BAR, "saved": SAVED_BAR},
        "summary": summarise(table),
        "small": list(small(options.seed)),
        "large": list(large(options.seed)),
    }
    print(json.dumps(figures, indent=1, default=float))
    if options.out:
        options.out.write_text(json.dumps(figures | {"scenarios": rows}, indent=1, default=float))


if __name__ == "__main__":
    main()
