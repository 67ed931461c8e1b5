"""Micro-profiles: single steps, adapter loads and the start of a real engine.

Every engine runs in a child process of its own (`adapter_twin.measure.micro_engine`): its memory
is given back when it ends, and a refused start or a crash is a row with its reason.
"""

import json
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from adapter_twin.measure.child import Child
from adapter_twin.measure.engine_flags import EngineFlags, environment, require_engine
from adapter_twin.measure.micro_plan import MicroPlan, check_plan
from adapter_twin.measure.model_folder import adapter_rank, check_model
from adapter_twin.measure.vllm_server import telling_line
from adapter_twin.tables.campaign_schemas import CAMPAIGN_TABLES

_ASKED_AT_START = (
    *("gpu_memory_utilization", "cpu_kv_cache_gib"),
    *("max_num_batched_tokens", "max_num_seqs", "max_model_len"),
)


def profile_engine(
    model_folder: Path, adapters: Sequence[Path], flags: EngineFlags, plan: MicroPlan, seed: int
) -> dict[str, pd.DataFrame]:
    """Start an engine in a child process and measure its steps and adapter loads.

    Parameters
    ----------
    model_folder : pathlib.Path
    adapters : sequence of pathlib.Path
        PEFT adapters; those whose rank exceeds ``max_lora_rank`` are left out.
    flags : EngineFlags
    plan : MicroPlan
    seed : int
        Decides the order of the points and the prompts.

    Returns
    -------
    dict of str to pandas.DataFrame
        The row of the table ``engine_starts``, whose ``server_failure`` is None where all went
        well; rows of ``micro_steps`` and ``adapter_loads``: none where the start was refused, and
        those measured until then where the engine died.

    Raises
    ------
    AdapterTwinError
        The model folder or one of the adapters is none, the plan asks for adapters that are not
        there, or no vLLM is installed.
    """
    check_model(model_folder)
    ranks = {str(folder.resolve()): adapter_rank(folder) for folder in adapters}
    check_plan(plan, flags, Counter(ranks.values()))
    require_engine()
    spec = {
        "model": str(model_folder.resolve()),
        "adapters": {path: rank for path, rank in ranks.items() if rank <= flags.max_lora_rank},
        "flags": asdict(flags),
        "plan": asdict(plan),
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix="adapter-twin-") as name:
        results = Path(name)
        (results / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        failure = run_child(
            [sys.executable, "-m", "adapter_twin.measure.micro_engine", name],
            environment(flags),
            results / "log.txt",
        )
        return _collect(results, flags, failure)


def run_child(command: Sequence[str], variables: dict[str, str], log: Path) -> str | None:
    """Run a command to its end and return why it failed, if it did.

    The command and what it started are gone when this returns, also after an exception. The
    parameters are those of `adapter_twin.measure.child.Child`.
    """
    child = Child(command, variables, log)
    try:
        status = child.wait()
    finally:
        child.kill_session()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return telling_line(log) if status else None


def start_row(
    flags: EngineFlags, failure: str | None, measured: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """Return the row of the table ``engine_starts`` with what was measured, if anything was."""
    start = {
        **_slots_and_rank(flags),
        **dict.fromkeys(("kv_cache_tokens", "block_size", "startup_s", "capture_s")),
        **dict.fromkeys(("weights_gib", "slots_gib")),
        "server_failure": failure,
        **{name: getattr(flags, name) for name in _ASKED_AT_START},
        **(measured or {}),
    }
    return pd.DataFrame([start])


def _slots_and_rank(flags: EngineFlags) -> dict[str, int]:
    return {"adapter_slots": flags.max_loras, "max_lora_rank": flags.max_lora_rank}


def _collect(results: Path, flags: EngineFlags, failure: str | None) -> dict[str, pd.DataFrame]:
    started, engine = results / "start.json", _slots_and_rank(flags)
    measured = json.loads(started.read_text(encoding="utf-8")) if started.is_file() else {}
    tables = {"engine_starts": start_row(flags, failure, measured)}
    for name in ("micro_steps", "adapter_loads"):
        rows = _read_rows(results / f"{name}.jsonl").assign(**engine)
        tables[name] = rows.reindex(columns=[*CAMPAIGN_TABLES[name].columns])
    return tables


def _read_rows(path: Path) -> pd.DataFrame:
    """Read rows written one a line; a kill may have cut the last one short."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return pd.DataFrame([json.loads(line) for line in lines])
