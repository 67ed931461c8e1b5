"""The twin's one verb: `simulate`."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import simpy
from numpy.typing import NDArray

from adapter_twin.errors import require
from adapter_twin.laws import Calibration
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.records import Simulation, make_gaps, make_records
from adapter_twin.twin.session import Session
from adapter_twin.twin.wiring import begin
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import run_seed, run_to_workload
from adapter_twin.workload.trace import Trace, generate, generators
from adapter_twin.workload.traffic import Workload


def simulate(
    workload: Workload,
    engine: EngineConfig,
    calibration: Calibration,
    *,
    seed: int = 0,
    observer: bool = False,
    clock: Literal["compiled", "simpy"] = "compiled",
    trace: Trace | None = None,
    policy: Policy = VLLM,
) -> Simulation:
    """Predict how an engine serves a workload, from configuration alone.

    Parameters
    ----------
    workload : Workload
    engine : EngineConfig
    calibration : Calibration
        The laws of the engine's model, GPU and version.
    seed : int
        Same seed, same records, bit for bit. The traffic does not depend on the engine, so engines
        are compared on the same requests. It also decides in which order a step touches its
        adapters, which in vLLM differs from process to process.
    observer : bool
        Include what the measurement did to itself: its load generator and its scrapes.
    clock : {"compiled", "simpy"}
        Who turns the engine loop; the records are the same.
    trace : Trace, optional
        What `draw_requests` returns for these arguments, where several engines share it.
    policy : Policy
        vLLM's own, one of `adapter_twin.twin.policies`, or of yours.

    Returns
    -------
    Simulation

    Raises
    ------
    AdapterTwinError
        The GPU would refuse to start this configuration, or a request does not fit in its KV cache.

    Examples
    --------
    >>> from adapter_twin import load_calibration, service_of
    >>> from adapter_twin import Lengths, deal_adapters
    >>> lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    >>> adapters = deal_adapters(96, [0.1, 0.05, 0.025], [8, 16])
    >>> workload = Workload(adapters=adapters, duration_s=600, lengths=lengths)
    >>> model = "llama-3.1-8b-instruct"
    >>> engine = EngineConfig(model=model, max_loras=32, max_cpu_loras=96, max_lora_rank=16)
    >>> run = simulate(workload, engine, load_calibration("auto", model))
    >>> service_of(run)["starved"]
    False
    """
    if trace is None:
        trace = draw_requests(workload, calibration, seed=seed, observer=observer)
    require(
        not (observer and trace.waits),
        "observer: the reference measurement's client waits for no answers; leave it out",
    )
    *_, order = generators(seed)
    session = begin(
        trace,
        engine,
        calibration,
        workload.adapters,
        order,
        duration_s=workload.duration_s,
        observer=observer,
        policy=policy,
    )
    calibration.warn_if_prior()
    calibration.warn_outside_range(engine, workload)
    if clock == "simpy":
        run_in_simpy(session)
    else:
        session.run()
    return Simulation(
        records=make_records(session, calibration.front_end.overhead_s),
        gaps=make_gaps(session),
        steps=session.steps[: session.clock.steps],
        pauses=session.pauses[: session.clock.pauses],
        workload=workload,
        engine=engine,
        seed=seed,
        calibration=calibration.name,
        policy=policy,
        unsent_requests=len(trace) - int(session.clock.accepted) if trace.waits else None,
    )


def run_in_simpy(session: Session) -> None:
    """Run a session under SimPy, where other processes can act between two of its steps."""
    env = simpy.Environment()

    def turn_engine_loop() -> Generator[simpy.Event]:
        while (event_s := session.turn()) <= session.front_end.duration_s:
            # SimPy adds delays and so rounds; the session's clock holds the exact time.
            yield env.timeout(max(event_s - env.now, 0.0))
            session.clock["now_s"] = event_s

    env.process(turn_engine_loop())
    env.run()


def draw_requests(
    workload: Workload, calibration: Calibration, *, seed: int = 0, observer: bool = False
) -> Trace:
    """Draw the requests of a workload, with the output lengths that the model will give them.

    A trace tells these itself. Parameters are those of `simulate`.
    """
    traffic, stops, _ = generators(seed)
    if observer and workload.arrivals.process == "poisson":
        arrivals = replace(workload.arrivals, process=calibration.measurement.arrivals)
        workload = replace(workload, arrivals=arrivals)

    def emitted(output_tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        return calibration.early_stop.apply(output_tokens, stops)

    return generate(workload, traffic, calibration.lengths.marginals, emitted)


def simulate_run(
    row: Mapping[str, Any], calibration: Calibration, *, seed: int = 0, observer: bool = True
) -> Simulation:
    """Predict a measured run from the configuration columns of its row.

    Parameters
    ----------
    row : mapping
        See `adapter_twin.workload.files.run_to_workload`.
    calibration : Calibration
    seed : int
        Of the traffic, where the row does not tell the seed of its load generator.
    observer : bool
        As for `simulate`.
    """
    engine, workload = run_to_workload(row)
    own = run_seed(row)
    seed = own if observer and own is not None else seed
    return simulate(workload, engine, calibration, seed=seed, observer=observer)
