"""The laws of a calibration in compiled form, and a run laid out by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adapter_twin.laws import Calibration
from adapter_twin.laws.front_end import UNLIMITED
from adapter_twin.twin.clock import FrontEnd, StepLaw
from adapter_twin.twin.layout import new_session
from adapter_twin.twin.policy import VLLM, Policy
from adapter_twin.twin.session import Session
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import Trace


def begin(
    trace: Trace,
    engine: EngineConfig,
    calibration: Calibration,
    adapters: Sequence[Adapter],
    order: np.random.Generator,
    *,
    duration_s: float,
    observer: bool = False,
    policy: Policy = VLLM,
) -> Session:
    """Lay out a run by a calibration's laws.

    Parameters
    ----------
    trace : Trace
    engine : EngineConfig
    calibration : Calibration
    adapters : sequence of Adapter
        Those that the trace's numbers stand for.
    order : numpy.random.Generator
        Draws the order in which the server's steps touch adapters.
    duration_s : float
    observer : bool
        Include what the measurement did to itself.
    policy : Policy
    """
    engine = with_defaults(engine, trace, calibration)
    slots = policy.reserves_slots
    ranks = np.array([adapter.rank for adapter in adapters])
    load_s, read_s = calibration.load_times_s(engine, adapters, slots=slots)
    return new_session(
        trace,
        engine,
        step_law(calibration, engine, merging=policy.merges),
        front_end_law(calibration, duration_s, observer),
        calibration.require_start(engine, slots=slots),
        load_s,
        read_s,
        policy,
        None if slots else calibration.memory.adapter_blocks(ranks, engine),
        places=order.permutation(len(ranks)),
        pinned=np.array([adapter.pinned for adapter in adapters], bool),
        priorities=np.array([adapter.priority for adapter in adapters], np.int64),
        reserves_prompts=calibration.version.reserves_prompts,
        max_model_len=calibration.memory.max_model_len(engine),
        preloaded=engine.lora_modules == "all",
        overhead_s=calibration.front_end.overhead_s,
    )


def with_defaults(engine: EngineConfig, trace: Trace, calibration: Calibration) -> EngineConfig:
    """Return an engine that says what is on where it left that out.

    Calibrations are measured without prefix caching, so it is off; but where requests share what
    they begin with it is on, as it is in vLLM.

    Parameters
    ----------
    engine : EngineConfig
    trace : Trace
    calibration : Calibration
    """
    caching = engine.enable_prefix_caching
    return replace(
        engine,
        enable_prefix_caching=trace.contents is not None if caching is None else caching,
        async_scheduling=calibration.is_async(engine),
    )


def step_law(calibration: Calibration, engine: EngineConfig, *, merging: bool = False) -> StepLaw:
    """Return the step-time and scheduling laws for an engine, in s.

    Parameters
    ----------
    calibration : Calibration
    engine : EngineConfig
    merging : bool
        Also for the steps of a merged adapter.
    """
    ms = 1e-3
    scheduling, step_time = calibration.scheduling, calibration.step_time
    coefficients = step_time.for_engine(engine.max_loras, engine.max_lora_rank)
    if merging:
        coefficients = np.vstack((coefficients, step_time.for_engine(0, 0)))
    return StepLaw(
        token_breaks=np.array(step_time.token_breaks_, float),
        coefficients=ms * coefficients,
        per_arrival=ms * step_time.arrival_ms,
        scheduling=ms
        * np.array([scheduling.base_ms_, scheduling.per_running_ms_, scheduling.per_scanned_ms_]),
    )


def front_end_law(calibration: Calibration, duration_s: float, observer: bool) -> FrontEnd:
    """Return the front end's window and pauses, in s.

    Parameters
    ----------
    calibration : Calibration
    duration_s : float
    observer : bool
        Include the client's cap and the scrapes of the measurement.
    """
    ms = 1e-3
    measured = calibration.measurement
    return FrontEnd(
        duration_s=float(duration_s),
        in_flight_cap=measured.in_flight_cap if observer else UNLIMITED,
        first_use_s=ms * calibration.front_end.first_use_ms_,
        scrape_period_s=measured.scrape_period_s if observer else np.inf,
        scrape_s=ms * measured.scrape_ms_,
        scrape_s_per_label=ms * measured.scrape_ms_per_label_,
        scrape_s_per_name=ms * measured.scrape_ms_per_name_,
        scrape_s_per_label_running=ms * measured.scrape_ms_per_label_running_,
        scrape_pause_share=measured.scrape_pause_share_,
    )
