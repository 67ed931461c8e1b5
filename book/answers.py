"""What ``--json`` prints: a JSON Schema of each verb, made by running the verb.

``python -m book.answers`` writes ``book/answers.json``. A test holds the verbs to it, so that no
key comes, goes or changes its type unnoticed.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from adapter_twin import cli
from adapter_twin.tables import datasets
from adapter_twin.workload.tensor_files import write_tensors

TARGET = Path(__file__).with_suffix(".json")

MODEL = "llama-3.1-8b-instruct"
ADAPTERS = {"count": 16, "request_rates": [0.1, 0.05], "ranks": [8, 16]}
LENGTHS = {"mean_input_tokens": 223, "mean_output_tokens": 198}
SLO = {"slo": {"ttft_ms": 2000, "percentile": 95}}
PRIOR = {"gpu": "l40s"}
BURSTS = {
    "adapters": {"count": 4, "request_rates": [0.2, 0.1], "ranks": [8, 16]},
    "arrivals": {"process": "gamma", "cv": 2.0},
}
"""Traffic for which one slot is not even simulated."""
ENGINE = {"model": MODEL, "max_loras": 8, "max_cpu_loras": 16}
TRAFFIC = {"adapters": ADAPTERS, "lengths": LENGTHS}
CONFIG = {"engine": ENGINE, "workload": {**TRAFFIC, "duration_s": 60}}
DEMAND = {"model": MODEL, **TRAFFIC, "slo": "none"}
PEFT_ADAPTER = {"path": "adapters/a", "request_rate": 0.1}
PEFT = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["v_proj"]}
FILES: dict[str, Any] = {
    "simulate.yaml": CONFIG,
    "with_slo.yaml": {**CONFIG, **SLO},
    "prefixes.yaml": {**CONFIG, "engine": {**ENGINE, "enable_prefix_caching": True}},
    "policy.yaml": {**CONFIG, "engine": {**ENGINE, "policy": {"name": "drain", "max_wait_s": 5}}},
    "empty.yaml": {**CONFIG, **SLO, "workload": {**TRAFFIC, "duration_s": 0.001}},
    "fleet.yaml": {**CONFIG, "fleet": {"replicas": 2}},
    "prior.yaml": {**CONFIG, **PRIOR},
    "recommend.yaml": DEMAND,
    "demand_with_slo.yaml": {**DEMAND, **SLO},
    "one_adapter.yaml": {**DEMAND, "adapters": [PEFT_ADAPTER]},
    "overload.yaml": {**DEMAND, "adapters": [{**PEFT_ADAPTER, "request_rate": 1000}]},
    "demand_on_prior.yaml": {**DEMAND, **PRIOR, **BURSTS},
    "busy.yaml": {**DEMAND, "adapters": {"count": 160, "request_rates": [0.1], "ranks": [64]}},
    "kinds.yaml": {
        **DEMAND,
        "fleet": {
            "kinds": [{"price_per_hour": 3.0}, {"gpu": "l40s", "price_per_hour": 1.0}],
            "objective": "price",
        },
    },
    "design.yaml": {
        "name": "tiny",
        "models": [MODEL],
        "served_adapters": [8],
        "adapter_slots": [8],
        "duration_s": 30,
        "factorial": {"rate_values": [0.1], "rates_per_workload": 1, "ranks": ["16"]},
    },
}
"""Files of the calls, in the folder where these are made; besides them `LOG` and measured runs."""

LOG = "timestamp,prompt_tokens,output_tokens{0}\n0,9,9{1}\n1,9,9{1}\n7,9,9{1}\n"
FLAGS = (
    "--max-model-len 8192 --max-loras 2 --max-lora-rank 8 "
    "--kv-cache-dtype auto --max-num-seqs 64 --max-num-batched-tokens 2048"
)
GRIDS = "--served-grid 16,32 --slots-grid 16"
CALLS = {
    "simulate": [
        *("simulate.yaml", "with_slo.yaml", "prefixes.yaml"),
        *("policy.yaml", "empty.yaml", "fleet.yaml", "prior.yaml"),
    ],
    "recommend": ["recommend.yaml", "demand_with_slo.yaml", "demand_on_prior.yaml"],
    "optimum": [f"--model {MODEL} --rates 0.1 --ranks 8 {GRIDS}"],
    "place": ["demand_with_slo.yaml", "busy.yaml", "demand_on_prior.yaml", "kinds.yaml"],
    "memory": [f"llama-3.1-8b --gpu 24 {FLAGS}", "llama-3.1-8b --gpu 8"],
    "shrink": [
        f"adapters --merge-above 0.9 --gpu 24 --model {MODEL} --max-model-len 4096 --out smaller",
        "adapters/a --workload one_adapter.yaml --jobs 1",
        "adapters/a --workload overload.yaml --jobs 1",
        "--from tuned --base base",
    ],
    "traffic": ["log.csv", "named.csv", "turns.csv", "single.csv"],
    "sweep": ["design.yaml --out sweep --jobs 1"],
    "validate": ["measured.parquet --jobs 1"],
    "data": [""],
    "doctor": [""],
}
"""Calls of each verb that show, together, all keys that it may print."""


NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def answers(verb: str) -> list[Any]:
    """Make the calls of a verb in an empty folder; return what they print."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            write_files()
            return [call(verb, *words.split(), "--json") for words in CALLS[verb]]
        finally:
            os.chdir(here)


def write_files() -> None:
    """Write the files that the calls read."""
    for name, content in FILES.items():
        Path(name).write_text(yaml.safe_dump(content))
    Path("log.csv").write_text(LOG.format("", ""))
    Path("named.csv").write_text(LOG.format(",adapter", ",a"))
    Path("turns.csv").write_text(LOG.format(",session_id", ",a"))
    Path("single.csv").write_text("\n".join(LOG.format("", "").split("\n")[:2]))
    datasets.write_table(datasets.load("runs").head(4), "measured.parquet")
    for name, weights in (("base", np.zeros((8, 8))), ("tuned", np.ones((8, 8)))):
        Path(name).mkdir()
        told = [("layers.0.q_proj.weight", "F32", weights), ("norm.weight", "F32", weights[0])]
        write_tensors(Path(name) / "model.safetensors", told)
    for name in "ab":
        folder = Path("adapters") / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(PEFT))
        sides = {"A": np.ones((16, 4096)), "B": np.ones((8, 16))}
        told = [(f"layers.0.v_proj.lora_{side}.weight", "BF16", one) for side, one in sides.items()]
        write_tensors(folder / "adapter_model.safetensors", told)


def call(*arguments: str) -> Any:
    """Run the command line; return the JSON that it prints, which has neither NaN nor Infinity."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(arguments)
    return json.loads(out.getvalue(), parse_constant=lambda name: sys.exit(f"{name} is no JSON"))


def schema_of(value: Any) -> dict[str, Any]:
    """Return the JSON Schema of a value; keys that are whole numbers stand for any."""
    if isinstance(value, list):
        held = [schema_of(one) for one in value]
        return {"type": ["array"]} | ({"items": reduce(merged, held)} if held else {})
    if isinstance(value, dict):
        inner = {name: schema_of(one) for name, one in value.items()}
        if inner and all(name.isdigit() for name in inner):
            return {"type": ["object"], "additionalProperties": reduce(merged, inner.values())}
        return {"type": ["object"], "properties": inner, "required": sorted(inner)}
    return {"type": [NAMES[type(value)]]}


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of what one of two schemas allows."""
    types = {*one["type"], *other["type"]}
    whole = {**one, **other, "type": sorted(types - {"integer"} if "number" in types else types)}
    common = one.keys() & other.keys()
    if "properties" in common:
        ours, theirs = one["properties"], other["properties"]
        both = {name: merged(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}
        whole["properties"] = {**ours, **theirs, **both}
        whole["required"] = sorted({*one["required"]} & {*other["required"]})
    if "items" in common:
        whole["items"] = merged(one["items"], other["items"])
    return whole


def schema(verb: str) -> dict[str, Any]:
    """Return the JSON Schema of what a verb prints."""
    return reduce(merged, map(schema_of, answers(verb)))


if __name__ == "__main__":
    TARGET.write_text(json.dumps({verb: schema(verb) for verb in CALLS}, indent=1) + "\n")
