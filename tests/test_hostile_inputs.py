"""No input ends a verb in a traceback: files and options damaged by chance, in processes apart.

`HOSTILE_CASES` is the number of cases of each kind, `HOSTILE_SEED` the first (``make fuzz``).
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pytest
import yaml

from adapter_twin import cli
from adapter_twin.tables import datasets

CASES = int(os.environ.get("HOSTILE_CASES", "4"))
SEED = int(os.environ.get("HOSTILE_SEED", "0"))
LONGEST_S = 40.0
MOST_BYTES = 3 << 30
"""A case may take this time, and this memory beside what is loaded."""

REPOSITORY = datasets.REPOSITORY
LLAMA = "llama-3.1-8b-instruct"
LENGTHS = {"distribution": "sharegpt", "mean_input_tokens": 223, "mean_output_tokens": 198}
LOGNORMAL = {**LENGTHS, "distribution": "lognormal", "cv": 0.6, "rank_correlation": 0.1}
ONE = {"name": "a", "rank": 8, "request_rate": 0.5, "pinned": False, "target_modules": ["q_proj"]}
DEALT = {"count": 4, "request_rates": [0.2, 0.1], "ranks": [8, 16]}
ENGINE = {"model": LLAMA, "max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 16}
FLAGS = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "block_size": 16,
    "gpu_memory_utilization": 0.9,
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 2**30,
    "enable_prefix_caching": True,
    "long_prefill_token_threshold": 0,
}
SLO = {"ttft_ms": 2000, "itl_ms": 100, "percentile": 99}
ARRIVALS = {"process": "gamma", "cv": 2.0}
ON_OFF = {"process": "on_off", "on_s": 2.0, "off_s": 5.0}
CLIENTS = {"max_concurrency": 4, "num_prompts": 40}
CONFIG = {
    "engine": {**ENGINE, **FLAGS, "policy": {"name": "drain", "max_wait_s": 5}},
    "workload": {
        "adapters": [ONE],
        "duration_s": 5,
        "lengths": {**LENGTHS, "shared_prefix_tokens": 16},
        "arrivals": ARRIVALS,
        "base_model_request_rate": 0.1,
    },
    "calibration": "auto",
    "seed": 0,
    "slo": SLO,
}
FLEET = {
    "engine": ENGINE,
    "workload": {"adapters": DEALT, "duration_s": 5, "lengths": LENGTHS},
    "fleet": {"replicas": 2, "router": "adapter_affinity"},
}
ZIPF = {"count": 4, "total_request_rate": 1.0, "zipf_exponent": 0.8, "ranks": [8]}
SPLIT = {"traffic_split": {"a": 0.5, "b": 0.5}, "total_request_rate": 1.0, "ranks": [8]}
DEMANDS = [
    {"model": LLAMA, "adapters": adapters, "lengths": lengths, "slo": SLO, "slots": [1, 2], **more}
    for adapters, lengths, more in (
        ([ONE], LENGTHS, {"engine": {"max_num_seqs": 64}}),
        (DEALT, LOGNORMAL, {"arrivals": ARRIVALS, "seed": 1, "calibration": "auto"}),
        (ZIPF, LENGTHS, {"arrivals": ON_OFF}),
        (DEALT, LENGTHS, {"arrivals": CLIENTS}),
        (DEALT, LENGTHS, {"arrivals": {**ON_OFF, "max_concurrency": 2}}),
        (SPLIT, LENGTHS, {"base_model_request_rate": 0.1}),
    )
]
FACTORIAL = {"rate_values": [0.1, 0.2], "rates_per_workload": 1, "ranks": ["8-16"]}
SPACE = {
    "workloads": 1,
    "mean_rate": [0.1, 0.2],
    "mean_input_tokens": [100, 200],
    "mean_output_tokens": [100, 200],
    "zipf_exponent": [0, 1],
    "arrival_cv": [1, 2],
    "ranks": ["8"],
}
DESIGN = {
    "name": "tiny",
    "models": [LLAMA],
    "served_adapters": [2, 4],
    "adapter_slots": [2],
    "duration_s": 5,
    "slo": SLO,
    "factorial": FACTORIAL,
    "space_filling": SPACE,
}
PEFT = {"peft_type": "LORA", "r": 8, "rank_pattern": {"v_proj": 4}, "target_modules": ["q_proj"]}
RUN = {
    "run_id": "run",
    "model": LLAMA,
    "rates_per_adapter": "0.1-0.05",
    "ranks": "8-16",
    "served_adapters": 4,
    "adapter_slots": 2,
    "max_lora_rank": 16,
    "max_num_seqs": 64,
    "duration_s": 5.0,
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 198.0,
    "max_num_batched_tokens": 2048,
    "seed": 0,
}
LOG = {
    "arrival_s": [0.0, 1.5, 3.0],
    "prompt_tokens": [10, 20, 30],
    "output_tokens": [5, 6, 7],
    "adapter": ["a", "a", ""],
}
BENCHMARK = {
    "model_id": LLAMA,
    "start_times": [0.0, 1.0],
    "ttfts": [0.1, 0.1],
    "itls": [[0.01], [0.01]],
    "input_lens": [10, 20],
    "output_lens": [5, 6],
    "lora_modules": ["a", "a"],
    "request_rate": 1.0,
    "num_prompts": 2,
    "duration": 2.0,
    "completed": 2,
}

HOSTILE: list[Any] = [
    *(None, True, "", "x", [], {}, [[]], {"a": 1}, [None], [1, "x"], "1e6", "nan"),
    *(-1, 0, 1, 2, -0.0, 0.5, 1.5, 1e-320, 1e-9, 1e300, 1e308, -1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *(10**6, 10**9, 2**31, 2**31 - 1, 2**40, 2**63, 2**64, -(2**63), 10**20, 10**400),
    *("../../../x", "/dev/null", "/", ".", "-h", "--model", "a=b", "$(HOME)", "a b", "a/b", "a\\b"),
    *(
        "\x1b[31mred\x07",
        "\u202eé\u2028",
        "a\nb",
        "a\x00b",
        "x" * 5000,
        "0.1-0.05",
        "8-16",
        "[bold]",
    ),
]
"""Values of wrong kinds and at extremes."""

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
WHOLE: list[bytes] = [
    *(b"", b"\n", b"\xef\xbb\xbf", b"\xff\xfe\x00a", bytes(range(256)), b"\x00", b"null", b"[]"),
    *(b"{}", b"1", b'"x"', b"{", b"- 1", b"a: 1\na: 2", b"&a [*a]", b"&a {b: *a}", b"--- 1\n--- 2"),
    *(
        b"[" * 100_000,
        b"{a: " * 5000,
        b'{"a":' * 100_000,
        b"- " * 20_000,
        b"!!python/name:os.system x",
    ),
    *(b"<<: 1", b"? [a, b]\n: 1", b"{1: 2, null: 3}", b"!!set {a, b}", b"x: !!binary gA=="),
    *(b"1" * 10_000, b'{"a": ' + b"9" * 10_000 + b"}", BOMB.encode(), b"PK\x03\x04", b"PAR1PAR1"),
]
"""Files that hold nothing, or something else."""


@dataclass
class Hostile:
    """Draws damage, and writes it into a folder."""

    chance: random.Random
    folder: Path

    def value(self) -> Any:
        return deepcopy(self.chance.choice(HOSTILE))

    def damage(self, content: Any) -> Any:
        """Return content with one or two places changed, left out, or with an unknown key."""
        content = {"": deepcopy(content)}
        for _ in range(self.chance.choice((1, 1, 1, 2))):
            owner, key = self.chance.choice(list(places(content)))
            what = self.chance.random()
            if what < 0.1 and key != "":
                del owner[key]
            elif what < 0.2 and isinstance(owner[key], dict):
                owner[key][self.chance.choice((1, "x", "\x1b[2J", "a.b"))] = self.value()
            elif what < 0.25 and isinstance(owner[key], list):
                owner[key] = owner[key] * self.chance.choice((0, 2, 1000))
            elif what < 0.3:
                owner[key] = [owner[key]]
            else:
                owner[key] = self.value()
        return content[""]

    def path(self, name: str) -> str:
        """Sometimes spoil a file in other ways, and return its name."""
        path, what = self.folder / name, self.chance.random()
        if what < 0.06 and not path.is_dir():
            path.write_bytes(self.chance.choice(WHOLE))
        elif what < 0.12 and path.is_file():
            data = bytearray(path.read_bytes())
            for _ in range(self.chance.choice((1, 1, 20))):
                if data:
                    data[self.chance.randrange(len(data))] = self.chance.randrange(256)
            path.write_bytes(data)
        elif what < 0.15 and path.is_file():
            size = path.stat().st_size
            path.write_bytes(path.read_bytes()[: self.chance.randrange(size + 1)])
        elif what < 0.18 and path.is_file():
            path.unlink()
            if what < 0.17:
                path.mkdir()
        return name

    def yaml(self, name: str, content: Any) -> str:
        text = yaml.dump(self.damage(content), Dumper=yaml.SafeDumper, allow_unicode=False)
        (self.folder / name).write_text(text)
        return self.path(name)

    def whole(self, name: str, content: Any) -> str:
        (self.folder / name).write_text(yaml.safe_dump(content))
        return name

    def text(self) -> str:
        return str(self.value()).replace("\x00", "")

    def json(self, name: str, content: Any) -> str:
        (self.folder / name).write_text(json.dumps(self.damage(content)))
        return self.path(name)

    def table(self, stem: str, content: Any, *kinds: str) -> str:
        """Write rows or columns, damaged, as one of the kinds of tables."""
        name = f"{stem}.{self.chance.choice(kinds or ('csv', 'parquet'))}"
        damaged = self.damage(content)
        try:
            frame = pd.DataFrame(damaged)
            if self.chance.random() < 0.1 and len(frame.columns):
                column = self.chance.choice(list(frame.columns))
                kind = self.chance.choice(("datetime64[ns]", "timedelta64[ns]", "category", "str"))
                frame[column] = frame[column].astype(kind)
            self.write(frame, name)
        except Exception:  # no such table can be
            (self.folder / name).write_text(json.dumps(damaged))
        return self.path(name)

    def write(self, frame: pd.DataFrame, name: str) -> None:
        path = self.folder / name
        if name.endswith(".csv"):
            frame.to_csv(path, index=False)
        elif name.endswith(".jsonl"):
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_parquet(path, index=self.chance.random() < 0.1)

    def options(self, **usual: str) -> list[str]:
        """Return options, of which some have another value or are left out."""
        given = []
        for name, value in usual.items():
            what = self.chance.random()
            if what < 0.15:
                value = self.text()
            if what < 0.95:
                given += [f"--{name.replace('_', '-')}", value]
        return given


def places(owner: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the places in nested lists and mappings."""
    for key in list(owner) if isinstance(owner, dict) else range(len(owner)):
        yield owner, key
        if isinstance(owner[key], (dict, list)):
            yield from places(owner[key])


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def _simulate(h: Hostile) -> list[str]:
    return ["simulate", h.yaml("c.yaml", h.chance.choice((CONFIG, CONFIG, FLEET))), "--json"]


def _simulate_options(h: Hostile) -> list[str]:
    (h.folder / "c.yaml").write_text(yaml.safe_dump(FLEET | {"fleet": None}))
    command = f"vllm serve {LLAMA} --max-loras 2 --max-lora-rank 16 --max-num-seqs {h.value()}"
    args = h.options(policy="drain max_wait_s=5", records="r.csv", trace="t.json")
    if h.chance.random() < 0.5:
        args += ["--policy", f"{h.chance.choice(('drain', 'merge', 'cost_aware'))} x={h.value()}"]
    return ["simulate", "c.yaml", *args, *h.options(vllm_args=command.replace("\x00", ""))]


def _calibration(h: Hostile) -> list[str]:
    names = (f"{LLAMA}@h100-64gb-vllm0.8.5", "small@cpu-vllm0.32.0")
    name = h.chance.choice(names)
    h.json("cal.json", json_of(datasets.SHIPPED / "calibrations" / f"{name}.json"))
    model = name.split("@")[0]
    config = {
        "engine": {"model": model, "max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 16},
        "workload": {"adapters": DEALT, "duration_s": 5, "lengths": LOGNORMAL},
        "calibration": "cal.json",
    }
    demand = {"model": model, "adapters": DEALT, "lengths": LOGNORMAL, "calibration": "cal.json"}
    verb = h.chance.choice(("simulate", "simulate", "recommend"))
    (h.folder / "c.yaml").write_text(yaml.safe_dump(config if verb == "simulate" else demand))
    return [verb, "c.yaml"]


def _demand(h: Hostile) -> list[str]:
    return ["recommend", h.yaml("d.yaml", h.chance.choice(DEMANDS))]


def _place(h: Hostile) -> list[str]:
    more = h.options(gpus="1", replicate_above="1.0", margin="0.02", manifests="k8s", jobs="1")
    return ["place", h.yaml("d.yaml", h.chance.choice(DEMANDS)), *more]


def _trace(h: Hostile) -> list[str]:
    name = _log_file(h)
    verb = h.chance.choice(("simulate", "recommend", "traffic"))
    if verb == "traffic":
        return ["traffic", name, *h.options(window_s="10", out="o.csv")]
    content: Any = {**DEMANDS[0], "adapters": [{"name": "a", "rank": 8}], "request_log": name}
    content.pop("lengths")
    if verb == "simulate":
        content = deepcopy(CONFIG)
        content["workload"]["arrivals"] = {"process": "trace", "path": name}
        content["workload"]["lengths"]["shared_prefix_tokens"] = 0
    (h.folder / "c.yaml").write_text(yaml.safe_dump(content))
    return [verb, "c.yaml"]


def _log_file(h: Hostile) -> str:
    what = h.chance.random()
    if what < 0.2:
        return h.json("log.json", BENCHMARK)
    if what < 0.3:
        rows = [{"start_time": 1.0, "prompt_tokens": 5, "output_tokens": 6}] * 2
        return h.json("log.json", {"benchmarks": [{"requests": {"successful": rows}}]})
    if what < 0.4:
        hashed = {"timestamp": [0, 1000], "input_length": [600, 700], "output_length": [3, 4]}
        return h.table("log", {**hashed, "hash_ids": [[1, 2], [1, 3]]}, "jsonl", "parquet")
    if what < 0.5:
        record = {
            "metadata": {"request_start_ns": 10**9, "benchmark_phase": "profiling"},
            "metrics": {
                "input_sequence_length": {"value": 5},
                "output_sequence_length": {"value": 6},
            },
        }
        lines = "\n".join(json.dumps(h.damage(record)) for _ in range(2))
        (h.folder / "log.jsonl").write_text(lines)
        return h.path("log.jsonl")
    return h.table("log", LOG, "csv", "jsonl", "parquet")


def _runs(h: Hostile) -> list[str]:
    name = h.table("runs", [RUN, {**RUN, "run_id": "other"}])
    verb = h.chance.choice(("predict", "predict", "validate"))
    if verb == "validate":
        return ["validate", name, *h.options(calibration="auto", jobs="1")]
    return ["predict", name, *h.options(calibration="auto", seed="0", jobs="1", out="p.csv")]


def _measured(h: Hostile) -> list[str]:
    campaign = REPOSITORY / "data" / "campaigns" / "cpu-small"
    rows = pd.read_parquet(campaign / "runs.parquet").head(2).assign(duration_s=5.0)
    name = h.table("runs", json.loads(rows.to_json(orient="records")))
    return ["validate", name, "--jobs", "1", *h.options(out="v")]


def _benchmark(h: Hostile) -> list[str]:
    content = deepcopy(FLEET | {"fleet": None})
    content["workload"].pop("lengths")
    (h.folder / "c.yaml").write_text(yaml.safe_dump(content))
    config = h.yaml("c.yaml", content) if h.chance.random() < 0.3 else "c.yaml"
    return ["validate", h.json("b.json", BENCHMARK), "--config", config]


def _optimum(h: Hostile) -> list[str]:
    slo = h.yaml("slo.yaml", SLO) if h.chance.random() < 0.5 else "none"
    usual = {
        "model": LLAMA,
        "rates": "0.1-0.05",
        "ranks": "8-16",
        "served_grid": "2,4",
        "slots_grid": "2",
        "slo": slo,
        "margin": "0.02",
        "mean_input_tokens": "100",
        "mean_output_tokens": "50",
        "calibration": "auto",
        "seed": "0",
        "jobs": "1",
    }
    if h.chance.random() < 0.4:
        for name in ("rates", "mean_input_tokens", "mean_output_tokens"):
            del usual[name]
        usual["request_log"] = _log_file(h)
    return ["optimum", *h.options(**usual)]


def _memory(h: Hostile) -> list[str]:
    model = h.folder / "model"
    model.mkdir()
    shapes = sorted((datasets.SHIPPED / "models").glob("*.json"))
    h.json("model/config.json", json_of(h.chance.choice(shapes))["config"])
    flags = h.options(
        gpu="l40s",
        max_loras="8",
        max_lora_rank="16",
        max_model_len="4096",
        gpu_memory_utilization="0.9",
        tensor_parallel_size="1",
        max_num_seqs="64",
        kv_cache_dtype="auto",
        engine="vllm-0.32.0",
    )
    return [
        "memory",
        h.chance.choice(("model", "model", h.text())),
        *flags,
    ]


def _folders(h: Hostile) -> list[str]:
    folder = h.folder / "loras" / "a"
    folder.mkdir(parents=True)
    h.json("loras/a/adapter_config.json", PEFT)
    tensor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    header = {tensor: {"dtype": "F16", "shape": [8, 4096], "data_offsets": [0, 65536]}}
    data = json.dumps(h.damage(header)).encode()
    if h.chance.random() < 0.5:
        size = len(data) if h.chance.random() < 0.8 else h.chance.choice((0, 2**31, 2**63, 5))
        (folder / "adapter_model.safetensors").write_bytes(size.to_bytes(8, "little") + data)
    adapters: Any = h.chance.choice(
        ({"folders": "loras", "request_rates": [0.1]}, [{"path": "loras/a", "request_rate": 0.1}])
    )
    if h.chance.random() < 0.3:
        adapters = h.table("loras", [ONE | {"path": "loras/a", "target_modules": None}], "csv")
    content = {"model": LLAMA, "adapters": adapters, "lengths": LENGTHS}
    return [
        "recommend",
        h.yaml("d.yaml", content) if h.chance.random() < 0.3 else h.whole("c.yaml", content),
    ]


def _sweep(h: Hostile) -> list[str]:
    usual = h.options(out="so", calibration="auto", jobs="1", table="t.parquet")
    return ["sweep", h.yaml("design.yaml", DESIGN), *usual]


def _sweep_folder(h: Hostile, made: Path) -> list[str]:
    shutil.copytree(made, h.folder / "so")
    shutil.copy(made / "design.yaml", h.folder / "design.yaml")
    files = [p for p in sorted((h.folder / "so").rglob("*")) if p.is_file()]
    victim = h.chance.choice(files)
    if victim.suffix == ".parquet" and h.chance.random() < 0.5:
        rows = pd.read_parquet(victim)
        name = str(victim.relative_to(h.folder).with_suffix(""))
        h.table(name, json.loads(rows.to_json(orient="records")), "parquet")
    else:
        for _ in range(4):
            h.path(str(victim.relative_to(h.folder)))
    if h.chance.random() < 0.5:
        return ["train", "so", *h.options(out="m", margin="0.02", jobs="1")]
    return ["sweep", "so/design.yaml" if h.chance.random() < 0.2 else "design.yaml", "--out", "so"]


def _campaign(h: Hostile) -> list[str]:
    path = REPOSITORY / "experiments" / "campaigns" / "smoke.yaml"
    content = yaml.safe_load(path.read_text())
    if h.chance.random() < 0.4:
        run = {"served_adapters": 4, "adapter_slots": 2, "ranks": [8], "max_lora_rank": 8}
        run["request_log"] = _log_file(h)
        content["serving"] = {"duration_s": 5, "runs": [run]}
    return ["profile", h.yaml("c.yaml", content), "--out", "po"]


def _study(h: Hostile) -> list[str]:
    folder = REPOSITORY / "experiments"
    study = {**yaml.safe_load((folder / "studies" / "smoke.yaml").read_text())}
    study |= {"campaign": "campaign.yaml", "workloads": ["w.yaml"]}
    shutil.copy(folder / "campaigns" / "smoke.yaml", h.folder / "campaign.yaml")
    shutil.copy(folder / "studies" / "smoke" / "popular-and-rare.yaml", h.folder / "w.yaml")
    return ["prove", h.yaml("s.yaml", study), "--engine", "cpu", "--out", "po"]


def _calibrate(h: Hostile) -> list[str]:
    """One table or line of a campaign is damaged; a whole one would be fitted, which takes long."""
    source = REPOSITORY / "data" / "campaigns" / "cpu-small"
    shutil.copytree(source, h.folder / "t")
    victim = h.chance.choice(sorted((h.folder / "t").iterdir()))
    if victim.suffix == ".parquet":
        rows = pd.read_parquet(victim).head(h.chance.choice((0, 1, 3)))
        name = str(victim.relative_to(h.folder).with_suffix(""))
        h.table(name, json.loads(rows.to_json(orient="records")), "parquet")
    elif victim.suffix == ".json":
        h.json(str(victim.relative_to(h.folder)), json_of(victim))
    else:
        h.yaml(str(victim.relative_to(h.folder)), yaml.safe_load(victim.read_text()))
    return ["calibrate", "t", "--out", "c.json", *h.options(model="small", jobs="1")]


def _watch(h: Hostile) -> list[str]:
    recorded = REPOSITORY / "tests" / "prove" / "recorded"
    lines = (recorded / "window-end.prom").read_text().splitlines()
    for _ in range(h.chance.choice((1, 1, 3))):
        at = h.chance.randrange(len(lines))
        head, _, _ = lines[at].rpartition(" ")
        lines[at] = f"{head} {h.value()}".replace("\n", " ")
    (h.folder / "m.prom").write_text("\n".join(lines))
    engine = {"model": "small", "max_loras": 2, "max_cpu_loras": 8, "max_lora_rank": 8}
    flags = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "block_size": 128}
    sizes = {"max_model_len": 1024, "kv_cache_memory_bytes": 2**28}
    workload = {"adapters": {**DEALT, "count": 8, "ranks": [8]}, "duration_s": 5}
    content = {"engine": engine | flags | sizes, "workload": workload | {"lengths": LOGNORMAL}}
    return [
        "watch",
        h.path("m.prom"),
        h.whole("c.yaml", content),
        *h.options(span_s="60", every="1"),
    ]


def _others(h: Hostile) -> list[str]:
    value = h.text()
    return h.chance.choice(
        (
            ["init", value],
            ["init", "w.yaml", "--kind", value],
            ["data", "--import", "."],
            ["doctor", value],
            ["init", "w.yaml", f"--{value}"],
            [value],
            [value, value],
            ["watch", "http://127.0.0.1:9", "x.yaml"],
            ["train", value, "--out", "m"],
            ["calibrate", value, "--out", "c.json"],
        )
    )


KINDS: dict[str, Callable[..., list[str]]] = {
    maker.__name__.strip("_"): maker
    for maker in (
        *(_simulate, _simulate_options, _calibration, _demand, _place, _trace, _runs, _measured),
        *(_benchmark, _optimum, _memory, _folders, _sweep, _sweep_folder, _campaign, _study),
        *(_calibrate, _watch, _others),
    )
}


def run_alone(arguments: list[str], folder: Path) -> tuple[int, str, str]:
    """Run the command line in a fork, which has all that is loaded; a signal is below 0."""
    child = os.fork()
    if child == 0:
        _in_child(arguments, folder)
    ends_s = time.monotonic() + LONGEST_S
    while True:
        ended, state, _ = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > ends_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    out, err = ((folder.parent / name).read_text(errors="replace") for name in ("out", "err"))
    return os.waitstatus_to_exitcode(state), out, err


def _in_child(arguments: list[str], folder: Path) -> NoReturn:
    status = 99
    try:
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, resource.RLIM_INFINITY))
        warnings.resetwarnings()
        cli.main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fault_of(arguments: list[str], folder: Path) -> str:
    """Run a case; return what is wrong with how it ends, nothing if all is well."""
    before = sorted(folder.rglob("*"))
    status, out, err = run_alone(arguments, folder)
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    left = [p.name for p in folder.rglob("*") if p.suffix == ".tmp"]
    if status not in (0, 2):
        return f"status {status}: {err[-3000:]}"
    if "Traceback" in err or left:
        return f"traceback, or half-written {left}: {err[-3000:]}"
    if any(ord(letter) < 32 and letter not in "\n\t" for letter in out + err):
        return f"a raw control character: {(out + err)!r}"[:2000]
    if status == 2:
        others = [
            line for line in err.splitlines() if not line.startswith(("warning: ", "error: "))
        ]
        if len(told) != 1 or others or len(err.splitlines()[-1]) > 1000:
            return f"not one short line: {err[-3000:]}"
        if sorted(folder.rglob("*")) != before and arguments[0] not in ("profile", "prove"):
            return f"left {set(folder.rglob('*')) - set(before)}: {err}"
    return ""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Load and compile what verbs need, which a fork then has, and make a sweep to damage."""
    folder = tmp_path_factory.mktemp("warm")
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "f.yaml").write_text(yaml.safe_dump(FLEET))
    (folder / "d.yaml").write_text(yaml.safe_dump(DEMANDS[0]))
    (folder / "s.yaml").write_text(yaml.safe_dump(DESIGN))
    verbs = (
        *(("simulate", folder / "c.yaml"), ("simulate", folder / "f.yaml")),
        *(("recommend", folder / "d.yaml"), ("place", folder / "d.yaml", "--jobs", "1")),
        ("sweep", folder / "s.yaml", "--out", folder / "sweep", "--jobs", "1"),
        ("train", folder / "sweep", "--out", folder / "models", "--jobs", "1"),
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        for verb in verbs:
            with pytest.raises(SystemExit) as ended:
                cli.main([str(word) for word in verb])
            print(verb, ended.value.code)
    return folder / "sweep"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_ends_well_or_in_one_line(kind: str, warm: Path, tmp_path: Path) -> None:
    make, faults = KINDS[kind], []
    for number in range(SEED, SEED + CASES):
        folder = tmp_path / f"{kind}-{number}" / "in"
        folder.mkdir(parents=True)
        hostile = Hostile(random.Random(f"{kind} {number}"), folder)
        arguments = make(hostile, warm) if kind == "sweep_folder" else make(hostile)
        fault = fault_of(arguments, folder)
        if fault:
            faults.append(f"{folder}: adapter-twin {arguments!r}: {fault}")
        else:
            shutil.rmtree(folder.parent)
    assert not faults, f"{len(faults)} of {CASES} cases\n" + "\n\n".join(faults)


def changed(content: Any, *path: Any, to: Any) -> Any:
    """Return content with one place changed."""
    content = deepcopy(content)
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = to
    return content


CALIBRATION = json_of(datasets.SHIPPED / "calibrations" / "small@cpu-vllm0.32.0.json")
DURATION = ("workload", "duration_s")
HUGE = {"count": 100_000, "request_rates": [10.0], "ranks": [8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(FLEET, *DURATION, to=1e9), ("workload.duration_s", "at most")),
        (changed(FLEET, "engine", "max_num_batched_tokens", to=2**40), ("max_num_batched_tokens",)),
        (changed(FLEET, "workload", "adapters", "count", to=10**12), ("adapters.count", "1e+06")),
        (changed(FLEET, "fleet", "replicas", to=10**9), ("fleet.replicas",)),
        (
            changed(CONFIG, "workload", "adapters", 0, "name", to="-h"),
            ("adapters[0].name", "letters"),
        ),
        (changed(CONFIG, "workload", "adapters", 0, "name", to="../x"), ("adapters[0].name",)),
        (changed(CONFIG, "workload", "lengths", "mean_input_tokens", to=1e300), ("at most 1e+07",)),
        (
            changed(changed(FLEET, "workload", "adapters", to=HUGE), *DURATION, to=3600),
            ("duration_s", "1e+06 requests/s", "GiB"),
        ),
    ],
)
def test_sizes_and_names_are_bounded(
    run: Callable[..., tuple[int, str, str]], content: Any, words: tuple[str, ...]
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(content))
    status, out, err = run("simulate", "c.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("step_time", "terms_", 0, "ms"), float("nan"), "step_time.terms_[0].ms: must be finite"),
        (("step_time", "terms_", 0, "ms"), -1.0, "step_time.terms_[0].ms: must be at least 0"),
        (("step_time", "terms_", 0, "ms"), 1e308, "step_time.terms_[0].ms: must be at most"),
        (("step_time", "terms_", 0, "regime"), 9, "step_time.terms_[0].regime: must be at most 2"),
        (("step_time", "terms_", 0, "feature"), "x", "step_time.terms_[0].feature: must be one of"),
        (("step_time", "token_breaks_"), [9.0, 1.0], "step_time.token_breaks_: must increase"),
        (("loading", "full_slot_ms_"), "fast", "loading.full_slot_ms_: expected a number"),
        (("valid_range", "adapter_slots"), [1], "valid_range.adapter_slots: "),
        (("valid_range",), {}, "valid_range.adapter_slots: missing"),
    ],
)
def test_a_calibration_is_checked_where_it_is_read(
    run: Callable[..., tuple[int, str, str]], path: tuple[Any, ...], value: Any, words: str
) -> None:
    Path("cal.json").write_text(json.dumps(changed(CALIBRATION, *path, to=value)))
    engine = {**ENGINE, "model": "small"}
    Path("c.yaml").write_text(
        yaml.safe_dump({**FLEET, "engine": engine, "calibration": "cal.json"})
    )
    status, out, err = run("simulate", "c.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_aliases_that_stand_for_too_much_are_refused_at_once(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    Path("c.yaml").write_text(BOMB)
    status, _, err = run("simulate", "c.yaml")
    assert status == 2
    assert "its aliases stand for 4e+09 values" in err


def test_what_no_one_foresaw_is_one_line_and_a_traceback_on_demand(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a \x1b[31mfault")

    monkeypatch.setattr("adapter_twin.cli.keys.template", fail)
    status, _, err = run("init", "w.yaml")
    assert (status, err.count("\n")) == (1, 1)
    assert r"(ZeroDivisionError: a \x1b[31mfault); ADAPTER_TWIN_DEBUG=1 shows where" in err
    monkeypatch.setenv("ADAPTER_TWIN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["init", "w.yaml"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemError("in compiled code")])
def test_an_interrupt_is_one_line_wherever_it_comes(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*_: object) -> None:
        raise error from KeyboardInterrupt()

    monkeypatch.setattr("adapter_twin.cli.keys.template", interrupted)
    assert run("init", "w.yaml") == (130, "", "error: interrupted\n")


def test_a_placement_takes_the_place_of_the_one_before(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    demand = {**DEMANDS[0], "lengths": LOGNORMAL, "slo": "none"}
    for count, gpus in ((8, "2"), (4, "1")):
        content = {**demand, "adapters": {**DEALT, "count": count}}
        Path("d.yaml").write_text(yaml.safe_dump(content))
        assert run("place", "d.yaml", "--gpus", gpus, "--manifests", "k8s", "--jobs", "1")[0] == 0
    Path("k8s/service.yaml").touch()
    assert sorted(path.name for path in Path("k8s").iterdir()) == ["replica-0.yaml", "service.yaml"]


def test_a_refused_sweep_leaves_its_folder_to_the_corrected_one(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    wrong = changed(DESIGN, "factorial", "ranks", to=["8-x"])
    for content, expected in ((wrong, 2), (changed(DESIGN, "name", to="../x"), 2), (DESIGN, 0)):
        Path("s.yaml").write_text(yaml.safe_dump(content))
        assert run("sweep", "s.yaml", "--out", "so", "--jobs", "1")[0] == expected
