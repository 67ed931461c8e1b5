"""A large cluster in SimPy: ``python -m benchmarks.cluster``.

One million requests of 3,200 adapters in an hour, through 32 replicas that all serve all adapters,
with a router that looks at every replica for every request.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

from adapter_twin.fleet.cluster import simulate_cluster
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.routers import AdapterAffinity, LeastOutstanding, Router
from adapter_twin.laws import load_calibration
from adapter_twin.workload.adapters import zipf_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.traffic import Lengths, Workload

MODEL = "llama-3.1-8b-instruct"
REPLICAS, ADAPTERS, REQUESTS = 32, 3200, 1_000_000
HOUR_S = 3600.0
BAR_S = 300.0
ROUTERS: dict[str, Router] = {
    "least outstanding": LeastOutstanding(),
    "adapter affinity": AdapterAffinity(),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    arguments = parser.parse_args()

    laws = load_calibration("auto", MODEL)
    adapters = zipf_adapters(ADAPTERS, arguments.requests / HOUR_S, 0.8, [8, 16])
    workload = Workload(
        adapters=adapters,
        duration_s=HOUR_S,
        lengths=Lengths(mean_input_tokens=223, mean_output_tokens=200),
    )
    engine = EngineConfig(model=MODEL, max_loras=64, max_cpu_loras=ADAPTERS, max_lora_rank=16)
    everything = ReplicaPlan(engine, tuple(range(ADAPTERS)), (1 / REPLICAS,) * ADAPTERS)
    placement = Placement((everything,) * REPLICAS)
    rows = []
    for name, router in ROUTERS.items():
        began_s = time.perf_counter()
        run = simulate_cluster(workload, placement, laws, router)
        wall_s = time.perf_counter() - began_s
        served = run.by_replica()
        share = served.total_throughput.sum() / served.offered_tokens_per_s.sum()
        scale = 1 if sys.platform == "darwin" else 1024
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
        holds = "ok" if wall_s <= BAR_S else "MISSED"
        print(
            f"{name:18} {len(run.records):10,} requests {wall_s:6.1f} s (bar {BAR_S:.0f} s) "
            f"{holds}; {share:.1%} served; peak memory {peak_gib:.1f} GiB",
            flush=True,
        )
        rows.append({"router": name, "requests": len(run.records), "wall_s": wall_s})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
