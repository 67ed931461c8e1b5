"""Time the twin on one simulated hour of four workloads: ``python -m benchmarks [--json FILE]``.

Each time is that of one whole `simulate`, from the draw of the trace to the per-request records, in
a warm process; the median of the repetitions counts.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from adapter_twin.laws import load_calibration
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.traffic import Lengths, Workload

LLAMA, QWEN = "llama-3.1-8b-instruct", "qwen-2.5-7b-instruct"
HOUR_S = 3600.0
SIMPY_BAR_S = 10.0
MEMORY_BAR_GIB = 1.0
IMPORT_BAR_S = 0.5


@dataclass(frozen=True)
class Case:
    model: str
    served_adapters: int
    adapter_slots: int
    request_rates: tuple[float, ...]
    ranks: tuple[int, ...]
    times_real_time_bar: float

    @property
    def workload(self) -> Workload:
        return Workload(
            adapters=deal_adapters(self.served_adapters, self.request_rates, self.ranks),
            duration_s=HOUR_S,
            lengths=Lengths(mean_input_tokens=223, mean_output_tokens=198),
        )

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(
            model=self.model,
            max_loras=self.adapter_slots,
            max_cpu_loras=self.served_adapters,
            max_lora_rank=max(self.ranks),
        )


CASES = (
    Case(LLAMA, 16, 16, (3.2, 1.6, 0.8), (8,), 60_000),
    Case(LLAMA, 96, 16, (0.1, 0.05, 0.025), (8, 16, 16), 60_000),
    # The 8B does not start with 128 slots of rank 32.
    Case(QWEN, 128, 128, (0.4, 0.1, 0.05), (8, 16, 32), 60_000),
    Case(LLAMA, 128, 32, (1.6, 0.8, 0.4), (8, 16), 30_000),
)


@dataclass(frozen=True)
class Timing:
    model: str
    served_adapters: int
    adapter_slots: int
    requests: int
    steps: int
    compiled_s: float
    times_real_time: float
    times_real_time_bar: float
    simpy_s: float


def wall_s(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_case(case: Case, repetitions: int) -> Timing:
    workload, engine = case.workload, case.engine
    calibration = load_calibration("auto", model=case.model)
    run = simulate(workload, engine, calibration)
    times_s = [wall_s(lambda: simulate(workload, engine, calibration)) for _ in range(repetitions)]
    compiled_s = statistics.median(times_s)
    return Timing(
        model=case.model,
        served_adapters=case.served_adapters,
        adapter_slots=case.adapter_slots,
        requests=len(run.records),
        steps=len(run.steps),
        compiled_s=compiled_s,
        times_real_time=HOUR_S / compiled_s,
        times_real_time_bar=case.times_real_time_bar,
        simpy_s=wall_s(lambda: simulate(workload, engine, calibration, clock="simpy")),
    )


def import_s() -> float:
    """Time ``import adapter_twin`` in fresh interpreters (median of five)."""
    script = (
        "import time; t = time.perf_counter(); import adapter_twin; print(time.perf_counter() - t)"
    )
    command = [sys.executable, "-c", script]
    outputs = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(5)]
    return statistics.median(map(float, outputs))


def peak_memory_gib() -> float:
    """Return the largest resident size so far, including the compilation of the kernel."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def verdict(holds: bool) -> str:
    return "ok" if holds else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--repetitions", type=int, default=9, help="of the compiled runs")
    arguments = parser.parse_args()

    warnings.simplefilter("ignore")  # the ranks asked for reach beyond the measured ones
    print("One simulated hour of each workload (N adapters served from G slots)")
    print(
        f"{'N/G':>8} {'requests':>9} {'steps':>8} {'compiled':>9} {'x real time':>12} "
        f"{'bar':>7} {'':6} {'SimPy':>7} {'bar':>5}"
    )
    timings = []
    for case in CASES:
        t = time_case(case, arguments.repetitions)
        timings.append(t)
        print(
            f"{f'{t.served_adapters}/{t.adapter_slots}':>8} {t.requests:9,} {t.steps:8,} "
            f"{t.compiled_s:7.3f} s {t.times_real_time:12,.0f} {t.times_real_time_bar:7,.0f} "
            f"{verdict(t.times_real_time >= t.times_real_time_bar):6} {t.simpy_s:5.1f} s "
            f"{SIMPY_BAR_S:3.0f} s {verdict(t.simpy_s <= SIMPY_BAR_S)}",
            flush=True,
        )
    memory_gib, imported_s = peak_memory_gib(), import_s()
    holds = verdict(memory_gib <= MEMORY_BAR_GIB)
    print(f"peak memory {memory_gib:.2f} GiB (bar {MEMORY_BAR_GIB:.0f} GiB) {holds}")
    holds = verdict(imported_s <= IMPORT_BAR_S)
    print(f"import adapter_twin {imported_s:.3f} s (bar {IMPORT_BAR_S} s) {holds}")
    if arguments.json:
        figures = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cases": [asdict(timing) for timing in timings],
            "peak_memory_gib": memory_gib,
            "import_s": imported_s,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
