"""A calibration: all laws of one model on one GPU and engine version, kept as JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PlainValidator

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.emitted_lengths import EarlyStopLaw, LengthLaw
from adapter_twin.laws.estimator import Estimator, NotBelow0
from adapter_twin.laws.front_end import FrontEndLaw, MeasurementLaw
from adapter_twin.laws.linear_steps import LinearStepLaw
from adapter_twin.laws.loading import LoadingLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.laws.scheduling import SchedulingLaw
from adapter_twin.laws.slots import adapter_shares
from adapter_twin.laws.step_time import StepTimeLaw
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.engine_versions import EngineVersion, engine_version
from adapter_twin.workload.lengths import Floats
from adapter_twin.workload.models import read_object
from adapter_twin.workload.strict import dataclass, read
from adapter_twin.workload.traffic import Workload

_LEFT_OUT = ServeFlags()

_EXTRAPOLATED = {
    "kv_cache_dtype": "the KV cache's size counts, but {name} was measured with 16-bit attention",
    "lora_target_modules": "slots and copies count, but the steps of {name} adapt all modules",
}
"""Flags that were not measured, and what of them is known."""

RANGES = (
    *("adapter_slots", "served_adapters", "max_lora_rank"),
    *("mean_input_tokens", "mean_requested_output_tokens"),
)
"""A calibration tells the measured range of these columns."""

RANGE_MARGIN = 1.25
"""Values up to this factor outside the measured range give no warning."""


def _step_time_law(saved: object) -> StepTimeLaw:
    if isinstance(saved, StepTimeLaw):
        return saved
    is_linear = isinstance(saved, dict) and "terms_" in saved
    return read(LinearStepLaw if is_linear else RooflineLaw, saved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The laws that the twin runs on.

    Attributes
    ----------
    name : str
        ``<model>@<gpu>-vllm<version>``.
    model, gpu : str
        What the laws hold for, on the engine version of `memory`.
    memory, step_time, loading, scheduling, front_end, early_stop, lengths, measurement
        Fitted laws.
    valid_range : dict
        Lowest and highest value of each configuration column that the fit has seen.
    off_by : dict
        How far predictions are off, by regime and figure: see `adapter_twin.service.intervals`.
        Empty where no left-out workloads told.
    provenance : dict
        Where the measurements come from, rows used, date, package version.
    """

    name: str
    model: str
    gpu: str
    memory: MemoryLaw
    step_time: Annotated[StepTimeLaw, PlainValidator(_step_time_law)]
    loading: LoadingLaw
    scheduling: SchedulingLaw
    front_end: FrontEndLaw
    early_stop: EarlyStopLaw
    lengths: LengthLaw
    measurement: MeasurementLaw
    valid_range: dict[str, Annotated[list[int | float], Field(min_length=2, max_length=2)]]
    off_by: dict[str, dict[str, NotBelow0]] = field(default_factory=dict)
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        engine_version(self.memory.version)
        for column in RANGES:
            require(column in self.valid_range, f"valid_range.{column}: missing; add this key")

    @property
    def version(self) -> EngineVersion:
        """What is known of the engine's version."""
        return engine_version(self.memory.version)

    @property
    def origin(self) -> str:
        """Where it comes from, if it is a prior; empty for one that was measured."""
        source = self.provenance.get("source")
        source = source if isinstance(source, dict) else {}
        others = ", ".join(source.get("prior", []))
        where = f"{self.gpu} with vLLM {self.memory.version}"
        told = (
            f"a prior: {self.model} was not measured on {where}; speeds are from "
            f"{source.get('speeds')}, what else is measured from {others}"
        )
        if "batches" in source:
            told += f"; updated by {source['batches']} batches measured there"
        return told if others else ""

    @property
    def schedules_ahead(self) -> bool:
        """Whether its steps were measured with asynchronous scheduling: where vLLM has it on."""
        return self.version.async_scheduling and self.gpu != "cpu"

    def is_async(self, engine: EngineConfig) -> bool:
        """Return whether an engine schedules a step while the one before runs."""
        told = engine.async_scheduling
        return self.schedules_ahead if told is None else told

    def require_known(self, engine: EngineConfig) -> None:
        """Raise `AdapterTwinError` unless these laws can tell the steps of an engine.

        The version has no such flag, no step was measured with one, or vLLM refuses it.
        """
        self.version.require_known(engine)
        unmeasured = f"{self.name} was measured without; leave it out"
        require(
            engine.tensor_parallel_size == 1,
            f"engine.tensor_parallel_size: {unmeasured}, or ask adapter-twin memory",
        )
        require(not engine.specialize_active_lora, f"engine.specialize_active_lora: {unmeasured}")
        longest, budget = self.memory.max_model_len(engine), engine.max_num_batched_tokens
        require(
            engine.enable_chunked_prefill or longest <= budget,
            f"engine.enable_chunked_prefill: off, vLLM asks for max_num_batched_tokens of at least "
            f"max_model_len = {longest}, not {budget}; lower max_model_len or raise it",
        )
        on_cpu = self.memory.slots_ != "segments"
        require(
            not on_cpu or engine.gpu_memory_utilization == _LEFT_OUT.gpu_memory_utilization,
            "engine.gpu_memory_utilization: decides nothing on a CPU; give kv_cache_memory_bytes",
        )

    def require_start(self, engine: EngineConfig, *, slots: bool = True) -> int:
        """Return the KV-cache size in tokens of an engine.

        Parameters
        ----------
        engine : EngineConfig
        slots : bool
            Reserve them; a unified pool does not.

        Raises
        ------
        AdapterTwinError
            As `require_known`, or vLLM would not start.
        """
        self.require_known(engine)
        return self.memory.require_start(engine, slots=slots)

    def load_times_s(
        self, engine: EngineConfig, adapters: Sequence[Adapter], *, slots: bool = True
    ) -> tuple[Floats, Floats]:
        """Return what copies into a slot and reads from disk take in s, one per adapter.

        Parameters
        ----------
        engine : EngineConfig
        adapters : sequence of Adapter
        slots : bool
            Copies fill slots of ``max_lora_rank``; else they are as wide as the adapter.
        """
        if not adapters:
            return np.empty(0), np.empty(0)
        ranks = np.array([adapter.rank for adapter in adapters])
        shape, version = self.memory.shape, self.version
        changed = [(adapter.target_modules, adapter.layers) for adapter in adapters]
        shares = {
            kind: adapter_shares(engine, shape, version, adapter)
            for kind, adapter in dict(zip(changed, adapters, strict=True)).items()
        }
        tensors, weights = np.array([shares[kind] for kind in changed]).T
        copies_s = self.loading.load_s(ranks, engine.max_lora_rank if slots else ranks)
        return copies_s * tensors, self.loading.read_s(ranks * weights)

    def startup_s(self, engine: EngineConfig, adapters: Sequence[Adapter]) -> float:
        """Return the time in s from weights to ready: graphs, and adapters that are named then.

        Parameters
        ----------
        engine : EngineConfig
        adapters : sequence of Adapter
        """
        named = adapters if engine.lora_modules == "all" else ()
        copies_s, reads_s = self.load_times_s(engine, named)
        return self.memory.startup_s(engine) + float(copies_s.sum() + reads_s.sum())

    def warn_if_prior(self) -> None:
        """Warn that nothing of this was measured: before any other word of an answer."""
        if self.origin:
            warnings.warn(f"{self.name} is {self.origin}", stacklevel=3)

    def warn_outside_range(self, engine: EngineConfig, workload: Workload) -> None:
        """Warn of what lies outside the range of the measurements."""
        if engine.async_scheduling not in (None, self.schedules_ahead):
            warnings.warn(
                "engine.async_scheduling: the order of requests counts, but the steps of "
                f"{self.name} were measured the other way",
                stacklevel=3,
            )
        if engine.max_num_batched_tokens > self.memory.step_tokens_:
            warnings.warn(
                f"engine.max_num_batched_tokens: {self.name} was measured with steps of up to "
                f"{self.memory.step_tokens_} tokens; longer ones are an extrapolation",
                stacklevel=3,
            )
        served, kept = len(workload.adapters), engine.max_cpu_loras
        if kept < served:
            chain = ", in chains while it equals max_loras" if kept == engine.max_loras else ""
            warnings.warn(
                f"engine.max_cpu_loras: {kept} of the {served} adapters are kept in host memory, "
                f"the others are read from disk again and again{chain}; raise it to {served}",
                stacklevel=3,
            )
        for flag, told in _EXTRAPOLATED.items():
            if getattr(engine, flag) != getattr(_LEFT_OUT, flag):
                warnings.warn(f"engine.{flag}: {told.format(name=self.name)}", stacklevel=3)
        told = "rests on runs" if self.origin else "was measured"
        slots, rank, lengths = engine.max_loras, engine.max_lora_rank, workload.lengths
        means = lengths.mean_prompt_tokens, lengths.mean_output_tokens
        asked = (slots, len(workload.adapters), rank, *means)
        for column, value in zip(RANGES, asked, strict=True):
            low, high = self.valid_range[column]
            if self.origin and not slots and column in RANGES[:3]:
                continue  # the base model alone is what a version without adapters is known by
            if not low / RANGE_MARGIN <= value <= high * RANGE_MARGIN:
                warnings.warn(
                    f"{self.name} {told} with {column} from {low:g} to {high:g}; "
                    f"{value:g} is an extrapolation",
                    stacklevel=3,
                )

    def to_json(self) -> str:
        """Return the calibration as JSON text."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v.to_dict() if isinstance(v, Estimator) else v for k, v in values.items()}
        return json.dumps(plain, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Calibration:
        """Read a calibration; raise `AdapterTwinError` if the file or one of its fields is bad."""
        try:
            return read(cls, read_object(path, "one that adapter-twin calibrate wrote"))
        except AdapterTwinError as error:
            raise AdapterTwinError(
                f"calibration: {path} is no calibration ({error}); run adapter-twin calibrate"
            ) from None
