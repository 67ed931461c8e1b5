"""Placing many adapters, and small demands exactly: ``python -m benchmarks.placement``.

Seconds are wall-clock on one core, with the calls of the capacity model that each method needs of
its own. How methods compare over many demands is in the chapter on fleets.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.packing import Groups, best_greedy, first_fit_decreasing
from adapter_twin.fleet.proof.bound import lower_bound
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Lengths
from study.exact import fewest_gpus
from study.placement_scenarios import LENGTHS, draw_demand

METHODS: dict[str, Callable[[Oracle], Groups]] = {
    "first fit": first_fit_decreasing,
    "best greedy": best_greedy,
}
ADAPTERS, GPUS = 10_000, 300.0
LARGE = (("even", None), ("skewed", Slo(ttft_ms=2000.0)))
LARGE_BAR_S = 60.0
GROWING = (1_000, 10_000, 100_000)
SMALL, SMALL_ADAPTERS = 12, 10


def large(lengths: Lengths) -> Iterator[dict[str, object]]:
    """Yield placements of 10,000 adapters, by method."""
    for ranks, slo in LARGE:
        demand = draw_demand(np.random.default_rng(0), ADAPTERS, GPUS, 0.9, ranks, lengths, slo)
        bound = lower_bound(Oracle(demand))
        for name, method in METHODS.items():
            began_s = time.perf_counter()
            groups = method(Oracle(demand))
            seconds = time.perf_counter() - began_s
            row = {"ranks": ranks, "slo": slo is not None, "method": name, "gpus": len(groups)}
            yield row | {"bound": bound, "seconds": seconds}


def growing(lengths: Lengths) -> Iterator[dict[str, float]]:
    """Yield what more and more adapters cost, on GPUs in proportion."""
    for adapters in GROWING:
        gpus = GPUS * adapters / ADAPTERS
        demand = draw_demand(np.random.default_rng(0), adapters, gpus, 0.9, "even", lengths)
        began_s = time.perf_counter()
        oracle = Oracle(demand)
        groups = first_fit_decreasing(oracle)
        seconds = time.perf_counter() - began_s
        yield {"adapters": adapters, "gpus": len(groups), "asked": oracle.calls, "seconds": seconds}


def small(lengths: Lengths) -> Iterator[dict[str, object]]:
    """Yield small demands, of which the mixed-integer program knows the fewest GPUs."""
    for number in range(SMALL):
        rng = np.random.default_rng([0, number])
        slo = Slo(ttft_ms=2000.0) if number % 2 else None
        gpus = float(rng.uniform(2, 5))
        demand = draw_demand(rng, SMALL_ADAPTERS, gpus, 0.7, "skewed", lengths, slo)
        oracle = Oracle(demand)
        exact = fewest_gpus(oracle)
        yield {
            "fewest": len(exact.groups) if exact.optimal else None,
            "best greedy": len(best_greedy(oracle)),
            "bound": lower_bound(oracle),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args()

    mean_input_tokens, mean_output_tokens = LENGTHS[0]
    lengths = Lengths(mean_input_tokens=mean_input_tokens, mean_output_tokens=mean_output_tokens)
    print(f"{ADAPTERS:,} adapters (bar {LARGE_BAR_S:.0f} s)")
    rows = []
    for row in large(lengths):
        rows.append(row)
        seconds = float(str(row["seconds"]))
        verdict = "ok" if seconds <= LARGE_BAR_S else "MISSED"
        shown = row | {"seconds": f"{seconds:.1f}", "": verdict}
        print(", ".join(f"{name} {value}".strip() for name, value in shown.items()), flush=True)
    grown = list(growing(lengths))
    for row in grown:
        print(
            f"{row['adapters']:,} adapters, first fit: {row['gpus']:,} GPUs, {row['asked']:,} sets "
            f"asked about, {row['seconds']:.1f} s"
        )
    adapters, seconds = ([row[name] for row in grown] for name in ("adapters", "seconds"))
    exponent = np.polyfit(np.log(adapters), np.log(seconds), 1)[0]
    print(f"seconds grow with the adapters to the power of {exponent:.2f}")
    exact = list(small(lengths))
    solved = [row for row in exact if row["fewest"] is not None]
    greedy, bound = (
        sum(row[name] == row["fewest"] for row in solved) for name in ("best greedy", "bound")
    )
    print(
        f"{SMALL} demands of {SMALL_ADAPTERS} adapters: {len(solved)} solved exactly; the best "
        f"greedy placement has as few GPUs in {greedy}, the bound is as high in {bound}"
    )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"large": rows, "growing": grown, "small": exact}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
