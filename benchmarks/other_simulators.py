"""The twin beside other simulators of LLM serving: ``python -m benchmarks.other_simulators``.

Two of them run without a GPU and come from PyPI: vidur (MLSys 2024) and sched-sim. Neither knows
adapters, so the requests are the base model's. Everybody gets the same requests, KV blocks, token
budget and step times, the twin's law without what an arriving request costs, which the others have
no place for: vidur's own profiles are not in its wheel but fetched from a hub when it runs, and the
costs of sched-sim are a roofline. What is compared is thus how fast each turns its own scheduler
and event loop, and whether all three serve the requests alike. One process, one thread, in
processor time, which does not count what else the machine does; the twin is warm, and building the
simulators is not timed.

The environment is made by hand, for none of this is needed for anything else::

    python -m venv .venv-simulators
    .venv-simulators/bin/pip install vidur==0.0.26 sched-sim==0.2.1 --editable .
    OMP_NUM_THREADS=1 .venv-simulators/bin/python -m benchmarks.other_simulators

It records ``data/expected/other_simulators.csv``, which the chapter on the published twin shows.
"""

import argparse
import logging
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.laws.front_end import FrontEndLaw
from adapter_twin.measure.engine_flags import cpu_model
from adapter_twin.tables.datasets import write_table
from adapter_twin.twin.clock import step_seconds
from adapter_twin.twin.simulate import draw_requests, simulate
from adapter_twin.twin.state import Batch
from adapter_twin.twin.wiring import step_law
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import Trace
from adapter_twin.workload.traffic import Lengths, Workload
from study.results import EXPECTED, rounded

MODEL = "llama-3.1-8b-instruct"
REQUEST_RATES = (4.0, 16.0)
ENGINE = EngineConfig(model=MODEL, max_loras=1, max_cpu_loras=1, max_lora_rank=16)

Served = tuple[float, np.ndarray, np.ndarray]
"""Processor time in s; when each request's first and last token came, NaN where none did."""
StepTime = Callable[[int, int, int], float]
"""Seconds of a step, given its prompt tokens, its decodes, and the KV tokens that it reads."""


def twin(
    trace: Trace, workload: Workload, calibration: Calibration, clock: str = "compiled"
) -> Served:
    def run() -> tuple[float, object]:
        start = time.process_time()
        done = simulate(workload, ENGINE, calibration, trace=trace, clock=clock)
        return time.process_time() - start, done.records

    run()
    busy_s, records = run()
    return busy_s, records.first_token_s, records.end_s


def step_time(calibration: Calibration) -> StepTime:
    """Return the twin's step time of the base model for plain Python, scheduling included."""
    law = step_law(calibration, ENGINE)
    # lists: a number out of an array takes three times as long
    fast = law._replace(**{name: getattr(law, name).tolist() for name in
                           ("token_breaks", "coefficients", "scheduling")})  # fmt: skip

    def seconds(prompt_tokens: int, decodes: int, context_tokens: int) -> float:
        batch = Batch(prompt_tokens + decodes, decodes, context_tokens, 0, 0, 0.0, 0, False)
        return sum(step_seconds.py_func(fast, batch, decodes, 0))

    return seconds


def vidur(trace: Trace, duration_s: float, kv_blocks: int, seconds: StepTime) -> Served:
    """Run vidur with its scheduler of chunked prefills, without metrics of its own."""
    logging.disable(logging.CRITICAL)
    from vidur import config
    from vidur.entities import Replica
    from vidur.execution_time_predictor import ExecutionTimePredictorRegistry
    from vidur.simulator import Simulator
    from vidur.types import ExecutionTimePredictorType

    class Predictor:
        def __init__(self, **_: object) -> None: ...

        def get_execution_time(self, batch, stage):
            prompt_tokens = batch._num_prefill_tokens
            decodes = batch._total_num_q_tokens - prompt_tokens
            step_s = seconds(prompt_tokens, decodes, batch._total_num_kv_tokens)
            return SimpleNamespace(total_time=step_s, model_time=step_s)

    Replica._id = -1  # its router takes the first replica of a process for the first of a run
    kind = ExecutionTimePredictorType.RANDOM_FORREST  # the default
    ExecutionTimePredictorRegistry.unregister(kind)
    ExecutionTimePredictorRegistry.register(kind, Predictor)
    with tempfile.TemporaryDirectory() as folder:
        columns = {
            "PromptTokenCount": trace.prompt_tokens,
            "CompletionTokenCount": trace.output_tokens,
        }
        requests = pd.DataFrame({"Time": trace.arrival_s, **columns, "Date": "any"})
        requests.to_csv(file := Path(folder, "trace.csv"), index=False)
        simulator = Simulator(
            config.SimulationConfig(
                time_limit=int(duration_s),
                cluster_config=config.ClusterConfig(
                    replica_config=config.ReplicaConfig(
                        num_pipeline_stages=1, tensor_parallel_size=1
                    ),
                    cache_config=config.CacheConfig(
                        num_blocks=kv_blocks, watermark_blocks_fraction=0.0
                    ),
                    replica_scheduler_config=config.SarathiSchedulerConfig(
                        batch_size_cap=ENGINE.max_num_seqs,
                        chunk_size=ENGINE.max_num_batched_tokens,
                    ),
                ),
                request_generator_config=config.TraceRequestGeneratorConfig(
                    trace_file=str(file),
                    date="any",
                    prefill_scale_factor=1,
                    decode_scale_factor=1,
                    time_scale_factor=1,
                ),
                metrics_config=config.MetricsConfig(
                    write_metrics=False, enable_chrome_trace=False, output_dir=folder
                ),
            )
        )
        served = [event._request for _, event in sorted(simulator._event_queue, key=lambda e: e[0])]
        start = time.process_time()
        simulator.run()
        busy_s = time.process_time() - start
    first_s = [request._prefill_completed_at or np.nan for request in served]
    end_s = [request._completed_at if request.completed else np.nan for request in served]
    return busy_s, np.array(first_s), np.array(end_s)


def sched_sim(trace: Trace, duration_s: float, kv_blocks: int, seconds: StepTime) -> Served:
    from sched_sim.core.event_engine import Simulator
    from sched_sim.core.request import Request
    from sched_sim.hardware.presets import get_hardware_profile
    from sched_sim.schedulers.factory import create_scheduler

    hardware = get_hardware_profile("a100")  # an 8B model; its memory and costs are replaced
    scheduler = create_scheduler(
        "chunked",
        hardware,
        token_budget=ENGINE.max_num_batched_tokens,
        max_batch_size=ENGINE.max_num_seqs,
    )
    scheduler.block_manager.total_gpu_blocks = kv_blocks
    scheduler.block_manager.free_gpu_blocks = list(range(kv_blocks))
    costs = scheduler.latency_model
    costs.compute_mixed_step_time = lambda p, d, context: seconds(p, d, context + p)
    costs.compute_prefill_step_time = lambda p: seconds(p, 0, p)
    costs.compute_decode_step_time = lambda d, context: seconds(0, d, context)
    columns = (trace.arrival_s, trace.prompt_tokens, trace.output_tokens)
    requests = [
        # its first token comes with the prompt, and it counts those after it
        Request(
            request_id=str(i), arrived_at=at, prompt_tokens=prompt, output_tokens=max(out - 1, 1)
        )
        for i, (at, prompt, out) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
    ]
    simulator = Simulator(hardware, scheduler)
    simulator.submit_workload(requests)
    start = time.process_time()
    simulator.run(max_duration_s=duration_s)
    busy_s = time.process_time() - start
    times = [(request.first_token_at, request.completed_at) for request in requests]
    first_s, end_s = np.array(times, dtype=float).T
    return busy_s, first_s, end_s


def describe(trace: Trace, duration_s: float, served: Served) -> dict[str, float]:
    busy_s, first_s, end_s = served
    done = end_s <= duration_s
    tokens = (trace.prompt_tokens + trace.output_tokens)[done].sum()
    ttft_s = (first_s - trace.arrival_s)[done]
    tpot_s = (end_s - first_s)[done] / np.maximum(trace.output_tokens[done] - 1, 1)
    return {
        "busy_s": busy_s,
        "times_real_time": duration_s / busy_s,
        "completed_requests": int(done.sum()),
        "total_throughput": float(tokens / duration_s),
        "mean_ttft_ms": 1e3 * float(ttft_s.mean()),
        "p99_ttft_ms": 1e3 * float(np.percentile(ttft_s, 99)),
        "mean_tpot_ms": 1e3 * float(tpot_s.mean()),
    }


def engine_alone(calibration: Calibration) -> Calibration:
    """Return a calibration without a front end, in which an arriving request costs nothing."""
    step_time = copy(calibration.step_time)
    step_time.constants_ = step_time.constants_ | {"arrival_ms": 0.0}
    return replace(calibration, step_time=step_time, front_end=FrontEndLaw())


def compare(request_rate: float, duration_s: float) -> pd.DataFrame:
    """Return what every simulator makes of one trace, a row each."""
    calibration = engine_alone(load_calibration("auto", MODEL))
    workload = Workload(
        adapters=(Adapter(name="idle", rank=16, request_rate=0.0),),
        duration_s=duration_s,
        lengths=Lengths(mean_input_tokens=223, mean_output_tokens=198),
        base_model_request_rate=request_rate,
    )
    trace = draw_requests(workload, calibration)
    kv_blocks = calibration.require_start(ENGINE) // ENGINE.block_size
    given = trace, duration_s, kv_blocks, step_time(calibration)
    runs = {
        "this twin": twin(trace, workload, calibration),
        "this twin, SimPy": twin(trace, workload, calibration, "simpy"),
        f"vidur {version('vidur')}": vidur(*given),
        f"sched-sim {version('sched-sim')}": sched_sim(*given),
    }
    rows = [{"simulator": name, **describe(trace, duration_s, run)} for name, run in runs.items()]
    return pd.DataFrame(rows).assign(
        request_rate=request_rate,
        requests=len(trace),
        duration_s=duration_s,
        cpu=cpu_model(),
        python=platform.python_version(),
        adapter_twin=version("adapter-twin"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.other_simulators", description=__doc__
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="of simulated time")
    duration_s = parser.parse_args().seconds
    warnings.simplefilter("ignore")  # so few slots were never measured
    tables = [compare(request_rate, duration_s) for request_rate in REQUEST_RATES]
    table = pd.concat(tables, ignore_index=True)
    print(table.drop(columns=["cpu", "python"]).to_string())
    if duration_s == 3600:
        write_table(rounded(table), EXPECTED / "other_simulators.csv")


if __name__ == "__main__":
    main()
