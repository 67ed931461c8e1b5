"""Configurations as asked: an engine, its traffic and what is to be held, together.

Every class checks itself when constructed and raises `AdapterTwinError`, ``field: remedy``;
`adapter_twin.workload.files` reads the same classes from strict YAML and from rows of a runs table.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from adapter_twin.errors import require
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.strict import Count, Positive, Whole, dataclass
from adapter_twin.workload.traffic import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """A service objective: `percentile` % of the requests stay within the limits.

    Attributes
    ----------
    ttft_ms : float, optional
        Limit on the time to first token.
    itl_ms : float, optional
        Limit on a request's own mean inter-token latency.
    percentile : float
        Share of the requests that must comply, in percent.

    Examples
    --------
    >>> Slo(ttft_ms=2000, itl_ms=100)
    Slo(ttft_ms=2000.0, itl_ms=100.0, percentile=99.0)
    """

    ttft_ms: Positive | None = None
    itl_ms: Positive | None = None
    percentile: Annotated[float, Field(gt=0, lt=100)] = 99.0

    def __post_init__(self) -> None:
        require(self.percentile > 1, f"percentile: in percent, 99, not 0.99; got {self.percentile}")
        limited = self.ttft_ms is not None or self.itl_ms is not None
        require(limited, "ttft_ms: an SLO needs ttft_ms or itl_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Equal replicas of an engine.

    Attributes
    ----------
    replicas : int
    router : str or mapping
        Chooses the replica of each request, see `adapter_twin.fleet.routers`.
    """

    replicas: Annotated[Count, Field(le=10_000)]
    router: Any = "adapter_affinity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One configuration to simulate: the content of a ``CONFIG.yaml``.

    Attributes
    ----------
    engine : EngineConfig
    workload : Workload
    calibration : str
        A name, the path of a ``.json`` file, or ``auto``: the one of the engine's model.
    seed : int
    observer : bool
        Include the effect that the reference measurement had on itself.
    slo : Slo, optional
    policy : str or mapping, optional
        ``engine.policy`` of the file, for `adapter_twin.twin.policies.make_policy`.
    fleet : Fleet, optional
        Left out, it is one engine.
    """

    engine: EngineConfig
    workload: Workload
    calibration: str = "auto"
    seed: Whole = 0
    observer: bool = False
    slo: Slo | None = None
    policy: Any = "vllm"
    fleet: Fleet | None = None

    def __post_init__(self) -> None:
        check_ranks(self.engine, self.workload)


def check_ranks(engine: EngineConfig, workload: Workload) -> None:
    """Raise `AdapterTwinError` if an adapter does not fit in the engine's slots."""
    for adapter in workload.adapters:
        require(
            engine.max_loras > 0 or adapter.request_rate == 0,
            f"engine.max_loras: 0 slots serve the base model alone, and {adapter.name} has "
            "requests; give slots or leave the adapter out",
        )
        require(
            adapter.rank <= engine.max_lora_rank,
            f"engine.max_lora_rank: {adapter.name} has rank {adapter.rank}, above max_lora_rank "
            f"= {engine.max_lora_rank}; raise max_lora_rank or leave the adapter out",
        )


def config_hash(config: Any) -> str:
    """Return 12 hexadecimal digits that identify the content of a configuration dataclass."""
    content = json.dumps({type(config).__name__: asdict(config)}, sort_keys=True, default=_digest)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _digest(array: Any) -> str:
    """Return what identifies the content of an array."""
    return hashlib.sha256(array.tobytes()).hexdigest()
