"""A campaign of measurements on this machine, read from strict YAML."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws.slots import GIB, layer_slots_bytes
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.measure.micro_plan import MicroPlan
from adapter_twin.measure.model_folder import check_model
from adapter_twin.measure.pieces import MicroPiece, Piece, ServingPiece, as_logged
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig, LoraRank
from adapter_twin.workload.files import read_yaml
from adapter_twin.workload.models import ModelShape, model_shape, shipped_models
from adapter_twin.workload.strict import (
    Count,
    NotNegative,
    Positive,
    Some,
    Text,
    Whole,
    dataclass,
    read,
    suggestion,
)
from adapter_twin.workload.traffic import Lengths, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Micro:
    """Micro-profiles: one designed experiment on several engines.

    Attributes
    ----------
    engines : tuple of EngineFlags
        In the file, what differs from the campaign's `engine`.
    plan : MicroPlan
    """

    engines: Some[EngineFlags]
    plan: MicroPlan

    def adapter_ranks(self) -> tuple[int, ...]:
        """Return the rank of every synthetic adapter that the plan needs.

        One more than there are slots, of the lowest rank: the design makes requests wait for it.
        """
        counts = dict.fromkeys(self.plan.ranks, max(self.plan.adapters))
        lowest = min(counts)
        most_slots = max(flags.max_loras for flags in self.engines)
        counts[lowest] = max(counts[lowest], most_slots + 1)
        return tuple(rank for rank, count in counts.items() for _ in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRun:
    """One serving run: adapters, their traffic and the slots they share.

    Attributes
    ----------
    served_adapters, adapter_slots : int
    rates : tuple of float, optional
        Requests/s, dealt round-robin to the adapters.
    request_log : str, optional
        Log whose begin is replayed, with its times, adapters and lengths, in place of `rates`;
        where it names no adapters, it is dealt over them by their rates.
    ranks : tuple of int
        Ranks, dealt likewise.
    max_lora_rank : int
    held_out : bool
        Kept from fitting; decided here, before anything is fitted.
    repeats : int
        Times that the very same traffic is served.
    """

    served_adapters: Count
    adapter_slots: Count
    rates: Some[NotNegative] | None = None
    request_log: Text | None = None
    ranks: Some[Count]
    max_lora_rank: LoraRank
    held_out: bool = False
    repeats: Count = 1

    def __post_init__(self) -> None:
        require(
            self.adapter_slots <= self.served_adapters,
            f"adapter_slots: {self.adapter_slots} exceed served_adapters = {self.served_adapters}; "
            "lower the slots or serve more adapters",
        )
        require(
            max(self.ranks) <= self.max_lora_rank,
            f"ranks: {max(self.ranks)} exceeds max_lora_rank = {self.max_lora_rank}; raise it or "
            "leave the rank out",
        )
        told = self.rates is not None or self.request_log is not None
        require(told, "rates: missing; give requests/s, or a request_log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Serving runs with one window and one distribution of lengths.

    Attributes
    ----------
    duration_s : float
    lengths : Lengths, optional
        Of runs without a log.
    runs : tuple of ServingRun
    """

    duration_s: Positive
    lengths: Lengths | None = None
    runs: Some[ServingRun]

    def __post_init__(self) -> None:
        drawn = any(run.request_log is None for run in self.runs)
        require(self.lengths is not None or not drawn, "lengths: missing; add this key")
        require(self.lengths is None or drawn, "lengths: the request_log tells; leave it out")
        require(
            self.lengths is None or self.lengths.shared_prefix_tokens == 0,
            "lengths.shared_prefix_tokens: a campaign's prompts share nothing; leave it out",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """The content of a campaign file.

    Attributes
    ----------
    name : str
    model : str
        One of `adapter_twin.workload.models.shipped_models`, or the path of a model folder.
    engine : EngineFlags
        What all engines share; in the file, without adapter slots and ranks.
    budget_s : float
        Time for one call of `adapter-twin profile`; the next one goes on where it stopped.
    adapters : str, optional
        Folder of PEFT adapters, one a subfolder; left out, synthetic ones are written.
    cpu_memory_gib : float, optional
        Memory that adapter slots and KV cache share on a CPU, as they do on a GPU; it takes the
        place of `engine.cpu_kv_cache_gib`.
    seed : int
    micro : Micro, optional
    serving : Serving, optional
    """

    name: Text
    model: str
    engine: EngineFlags
    budget_s: Positive
    adapters: str | None = None
    cpu_memory_gib: Positive | None = None
    seed: Whole = 0
    micro: Micro | None = None
    serving: Serving | None = None

    def __post_init__(self) -> None:
        has_pieces = self.micro is not None or self.serving is not None
        require(has_pieces, "micro: nothing to measure; give micro, serving or both")
        self.pieces()  # an error tells where it is

    def sized(self, flags: EngineFlags) -> EngineFlags:
        """Return an engine's flags with the KV cache that its slots leave of `cpu_memory_gib`."""
        if self.cpu_memory_gib is None:
            return flags
        require(
            self.model in shipped_models(),
            "cpu_memory_gib: only for a shipped shape, as tiny or small; leave it out",
        )
        engine = EngineConfig(
            model=self.model, max_loras=flags.max_loras, max_lora_rank=flags.max_lora_rank
        )
        slots = layer_slots_bytes(engine, model_shape(self.model)) / GIB
        require(
            slots < self.cpu_memory_gib,
            f"max_loras: {flags.max_loras} slots of rank {flags.max_lora_rank} take {slots:.3g} of "
            f"cpu_memory_gib = {self.cpu_memory_gib}; give fewer or raise it",
        )
        return replace(flags, cpu_kv_cache_gib=self.cpu_memory_gib - slots)

    def pieces(self) -> list[Piece]:
        """Return what is to be measured; repeats of a serving run serve the same requests."""
        return [*self._micro_pieces(), *self._serving_pieces()]

    def _micro_pieces(self) -> Iterator[Piece]:
        if self.micro is None:
            return
        for index, flags in enumerate(self.micro.engines):
            with _naming(f"micro.engines[{index}]"):
                yield MicroPiece(
                    piece_id=f"micro-{index:02d}",
                    flags=self.sized(flags),
                    plan=self.micro.plan,
                    adapter_ranks=self.micro.adapter_ranks(),
                    seed=self.seed + index,
                )

    def _serving_pieces(self) -> Iterator[Piece]:
        if self.serving is None:
            return
        model = self.model if self.model in shipped_models() else Path(self.model).name
        for index, run in enumerate(self.serving.runs):
            place = f"serving.runs[{index}]"
            with _naming(place):
                flags = replace(
                    self.engine,
                    max_loras=run.adapter_slots,
                    max_lora_rank=run.max_lora_rank,
                    max_cpu_loras=run.served_adapters,
                )
                workload = run_traffic(run, self.serving, self.seed + index)
                drawn_by = run.rates if run.request_log is None else None
                for repeat in range(run.repeats):
                    told = {"held_out": run.held_out, "repeat": repeat, "source_path": place}
                    yield ServingPiece(
                        campaign=self.name,
                        piece_id=f"run-{index:03d}-{repeat}",
                        flags=self.sized(flags),
                        workload=workload,
                        rates=drawn_by or [one.request_rate for one in workload.adapters],
                        ranks=run.ranks,
                        seed=self.seed + index,
                        told={"model": model, **told},
                    )


def run_traffic(run: ServingRun, serving: Serving, seed: int) -> Workload:
    """Return the traffic of a run; of a log with the rates and lengths that its window has."""
    adapters = deal_adapters(run.served_adapters, run.rates or [0.0], run.ranks)
    if run.request_log is None:
        assert serving.lengths is not None
        return Workload(adapters=adapters, duration_s=serving.duration_s, lengths=serving.lengths)
    return as_logged(run.request_log, adapters, serving.duration_s, seed)


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Have an error name its place in the file."""
    try:
        yield
    except AdapterTwinError as error:
        raise AdapterTwinError(f"{place}.{error}") from None


_SLOTLESS = {"max_loras": 0, "max_lora_rank": 8, "max_cpu_loras": 0}


def load_campaign(path: str | Path) -> Campaign:
    """Read a campaign; paths in it are relative to its file.

    Raises
    ------
    AdapterTwinError
        The file cannot be read, or has an unknown, missing or wrong key, which the message names.
    """
    file = Path(path)
    content = read_yaml(file)
    if not isinstance(content, dict):
        return read(Campaign, content)
    model = content.get("model")
    if isinstance(model, str) and model not in shipped_models():
        content["model"] = _model_folder(model, file.parent)
    serving = content.get("serving")
    runs = serving.get("runs") if isinstance(serving, dict) else None
    for run in runs if isinstance(runs, list) else ():
        if isinstance(run, dict) and isinstance(run.get("request_log"), str):
            run["request_log"] = str((file.parent / run["request_log"]).absolute())
    if isinstance(content.get("adapters"), str):
        folder = file.parent / content["adapters"]
        require(folder.is_dir(), f"adapters: {folder} is no folder; give a folder of PEFT adapters")
        content["adapters"] = str(folder)
    engine = content.get("engine", {})
    if isinstance(engine, dict):
        for name in _SLOTLESS:
            require(name not in engine, f"engine.{name}: give it per engine or run, not for all")
        if model not in shipped_models():  # a real model has weights to read
            engine = {"load_format": "auto", **engine}
        content["engine"] = {**_SLOTLESS, **engine}
        read(EngineFlags, content["engine"], "engine")
        micro = content.get("micro")
        if isinstance(micro, dict) and isinstance(micro.get("engines"), list):
            micro["engines"] = [_shared(engine, own) for own in micro["engines"]]
    return read(Campaign, content)


def _model_folder(model: str, parent: Path) -> str:
    folder = parent / model
    choices = suggestion(model, shipped_models())
    require(folder.is_dir(), f"model: {model!r} is neither a folder nor a shape{choices}")
    ModelShape.of_config(check_model(folder))  # else it could be measured, but not calibrated
    return str(folder)


def _shared(engine: Mapping[str, Any], own: object) -> object:
    """Complete an engine of the micro-profiles with the flags that all engines share."""
    if not isinstance(own, dict):
        return own
    # As many in host memory as in slots, at least: the runner raises it to all there are.
    return {**engine, "max_cpu_loras": own.get("max_loras"), **own}
