"""Damage to what verbs read, drawn by chance: to files of every kind, and to command lines."""

import json
import random
import shlex
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from adapter_twin.tables import datasets
from adapter_twin.workload.tensor_files import write_tensors

REPOSITORY = datasets.REPOSITORY
RECORDED_PAGE = REPOSITORY / "tests" / "prove" / "recorded" / "window-end.prom"
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
    "enable_prefix_caching": True,
    "long_prefill_token_threshold": 0,
}
SLO = {"ttft_ms": 2000, "itl_ms": 100, "percentile": 99}
ARRIVALS = {"process": "gamma", "cv": 2.0}
ON_OFF = {"process": "on_off", "on_s": 2.0, "off_s": 5.0}
CLIENTS = {"max_concurrency": 4, "num_prompts": 40}
CONFIG = {
    "engine": {**ENGINE, **FLAGS},
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
DRAINING = {
    "engine": {**ENGINE, "policy": {"name": "drain", "max_wait_s": 5}},
    "workload": {"adapters": [ONE], "duration_s": 5, "lengths": LOGNORMAL},
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
        """Return a value of a wrong kind, at an extreme, or like none that anyone wrote down."""
        what = self.chance.random()
        if what < 0.1:
            return self.chance.randrange(-10, 100)
        if what < 0.2:
            return self.chance.choice((-1, 1)) * 10.0 ** self.chance.randrange(-300, 300)
        if what < 0.3:
            size = self.chance.randrange(9)
            return "".join(chr(self.chance.randrange(1, 0x300)) for _ in range(size))
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
        if name.endswith((".csv", ".csv.gz")):
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
    return ["simulate", h.yaml("c.yaml", h.chance.choice((CONFIG, DRAINING, FLEET))), "--json"]


def _simulate_options(h: Hostile) -> list[str]:
    (h.folder / "c.yaml").write_text(yaml.safe_dump(FLEET | {"fleet": None}))
    command = f"vllm serve {LLAMA} --max-loras 2 --max-lora-rank 16 --max-num-seqs {h.value()}"
    args = h.options(policy="drain max_wait_s=5", records="r.csv", trace="t.json", draws="2")
    if h.chance.random() < 0.5:
        args += ["--policy", f"{h.chance.choice(('drain', 'merge', 'cost_aware'))} x={h.value()}"]
    return ["simulate", "c.yaml", *args, *h.options(vllm_args=command.replace("\x00", ""))]


def _calibration(h: Hostile) -> list[str]:
    """A calibration is damaged, and read by any of the verbs that take one."""
    names = (f"{LLAMA}@h100-64gb-vllm0.8.5", "small@cpu-vllm0.32.0")
    name = h.chance.choice(names)
    h.json("cal.json", json_of(datasets.SHIPPED / "calibrations" / f"{name}.json"))
    model = name.split("@")[0]
    engine = {"model": model, "max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 16}
    workload = {"adapters": DEALT, "duration_s": 5, "lengths": LOGNORMAL}
    h.whole("c.yaml", {"engine": engine, "workload": workload, "calibration": "cal.json"})
    demand = {"model": model, "adapters": DEALT, "lengths": LOGNORMAL, "calibration": "cal.json"}
    h.whole("d.yaml", demand | {"slots": [1, 2], "slo": SLO})
    h.write(pd.DataFrame([{**RUN, "model": model}]), "runs.csv")
    (h.folder / "empty").mkdir()
    verb = h.chance.choice(("simulate", "recommend", "place", "optimum", "predict", "calibrate"))
    usual = {
        "simulate": "c.yaml",
        "recommend": "d.yaml",
        "place": "d.yaml --jobs 1",
        "predict": "runs.csv --calibration cal.json --out p.csv --jobs 1",
        "optimum": f"--model {model} --rates 0.1 --ranks 8 --served-grid 2,4 --slots-grid 2 "
        "--calibration cal.json --jobs 1",
        "calibrate": "empty --from cal.json --out c.json",
    }
    return [verb, *usual[verb].split()]


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


TURNS = {
    "session_id": ["x", "x", "y"],
    "think_s": [0.0, 1.0, 0.0],
}
BAILIAN = {"chat_id": [1, 2, 3], "parent_chat_id": [-1, 1, -1]}
MOONCAKE = {
    "timestamp": [0, 1000],
    "input_length": [600, 700],
    "output_length": [3, 4],
    "hash_ids": [[1, 2], [1, 3]],
}
AIPERF = {
    "metadata": {"request_start_ns": 10**9, "benchmark_phase": "profiling"},
    "metrics": {
        "input_sequence_length": {"value": 5},
        "output_sequence_length": {"value": 6},
    },
}
GUIDELLM_REQUEST = {"start_time": 1.0, "prompt_tokens": 5, "output_tokens": 6}


def _log_file(h: Hostile) -> str:
    what = h.chance.random()
    if what < 0.2:
        return h.json("log.json", BENCHMARK)
    if what < 0.3:
        requests = {"successful": [GUIDELLM_REQUEST] * 2}
        return h.json("log.json", {"benchmarks": [{"requests": requests}]})
    if what < 0.4:
        return h.table("log", MOONCAKE, "jsonl", "parquet")
    if what < 0.5:
        lines = "\n".join(json.dumps(h.damage(AIPERF)) for _ in range(2))
        (h.folder / "log.jsonl").write_text(lines)
        return h.path("log.jsonl")
    turns = h.chance.choice(({}, {}, TURNS, BAILIAN))
    return h.table("log", LOG | turns, "csv", "csv.gz", "jsonl", "parquet")


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
    """One file of a study is damaged: its own, its campaign's or a workload's."""
    folder, victim = REPOSITORY / "experiments", h.chance.randrange(3)
    study = {**yaml.safe_load((folder / "studies" / "smoke.yaml").read_text())}
    study |= {"campaign": "campaign.yaml", "workloads": ["w.yaml"]}
    campaign = yaml.safe_load((folder / "campaigns" / "smoke.yaml").read_text())
    workload = (folder / "studies" / "smoke" / "popular-and-rare.yaml").read_text()
    files = {"s": study, "campaign": campaign, "w": yaml.safe_load(workload)}
    for number, (name, content) in enumerate(files.items()):
        (h.yaml if number == victim else h.whole)(f"{name}.yaml", content)
    return ["prove", "s.yaml", "--engine", "cpu", "--out", "po"]


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


WATCHED = {
    "engine": {
        "model": "small",
        "max_loras": 2,
        "max_cpu_loras": 8,
        "max_lora_rank": 8,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "block_size": 128,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 2**28,
    },
    "workload": {
        "adapters": {**DEALT, "count": 8, "ranks": [8]},
        "duration_s": 5,
        "lengths": LOGNORMAL,
    },
}


def _watch(h: Hostile) -> list[str]:
    """A page of metrics is damaged: values, names, labels and whole lines."""
    lines = RECORDED_PAGE.read_text().splitlines()
    for _ in range(h.chance.choice((1, 1, 3, 30))):
        at, what = h.chance.randrange(len(lines)), h.chance.random()
        head, _, _ = lines[at].rpartition(" ")
        if what < 0.5:
            lines[at] = f"{head} {h.value()}".replace("\n", " ")
        elif what < 0.6:
            del lines[at]
        elif what < 0.7:
            lines.insert(h.chance.randrange(len(lines)), lines[at])
        elif what < 0.9:
            cut = h.chance.randrange(len(lines[at]) + 1)
            hostile = h.chance.choice(("{", "}", '"', ",", "=", " ", "#", "\\", h.text()[:50]))
            lines[at] = lines[at][:cut] + hostile + lines[at][cut:]
        else:
            lines[at] = lines[at][: h.chance.randrange(len(lines[at]) + 1)]
    (h.folder / "m.prom").write_text("\n".join(lines))
    more = h.options(span_s="60") if h.chance.random() < 0.9 else ["--every", "1"]
    return ["watch", h.path("m.prom"), h.whole("c.yaml", WATCHED), *more]


USUAL = {
    "predict": "runs.csv --out p.csv --calibration auto --seed 0 --jobs 1 --observer none "
    "--intervals",
    "validate": "runs.csv --calibration auto --out v --seed 0 --jobs 1 --json --config c.yaml",
    "simulate": "c.yaml --trace t.json --records r.csv --policy vllm --draws 2 --json --vllm-args "
    f"'vllm serve {LLAMA} --max-loras 2 --max-lora-rank 16'",
    "traffic": "log.csv --window-s 10 --out o.csv --json",
    "memory": "llama-3.1-8b --gpu l40s --engine vllm-0.32.0 --json --max-loras 8 "
    "--max-lora-rank 16 --max-model-len 4096 --gpu-memory-utilization 0.9 --kv-cache-dtype auto",
    "init": "w.yaml --kind recommend --force",
    "optimum": f"--model {LLAMA} --rates 0.1-0.05 --ranks 8-16 --served-grid 2,4 --slots-grid 2 "
    "--calibration auto --slo slo.yaml --margin 0.02 --mean-input-tokens 100 "
    "--mean-output-tokens 50 --request-log log.csv --seed 0 --jobs 1 --json",
    "recommend": "d.yaml --json",
    "place": "d.yaml --gpus 1 --replicate-above 1.0 --margin 0.02 --manifests k8s "
    "--picture p.png --jobs 1 --json",
    "sweep": "s.yaml --out so --calibration auto --jobs 1 --table t.parquet --json",
    "train": "so --out m --margin 0.02 --jobs 1 --json",
    "calibrate": "empty --out c.json --prior --from prior.json --gpu h100-64gb --engine-version "
    "vllm-0.8.5 --jobs 1 --model mistralai/Mistral-7B-v0.3",
    "profile": "campaign.yaml --out po --json",
    "prove": "study.yaml --engine cpu --out po --json",
    "shrink": "adapter --from tuned --base base --energy 0.9 --rank 2 --merge-above 0.9 --out so "
    "--gpu 24 --model llama-3.1-8b --max-model-len 4096 --workload d.yaml --jobs 1 --json",
    "watch": "m.prom w.yaml --every 1 --span-s 60 --json",
    "data": "--import empty --json",
    "doctor": "--json",
}
"""A command line of each verb, with every option."""

KEPT = ("--out", "--jobs")
"""Options that are left out by damage alone: without jobs, processes start on every core."""

ALONE = {"--fetch": "clones a repository", "--scheduler": "waits for an answer"}
"""Options that reach the network, and what they do there, are left alone."""


def write_sound_files(h: Hostile) -> None:
    """Write what the lines of `USUAL` name."""
    for name, content in (("c", CONFIG), ("d", DEMANDS[0]), ("s", DESIGN), ("slo", SLO)):
        h.whole(f"{name}.yaml", content)
    h.write(pd.DataFrame([RUN]), "runs.csv")
    h.write(pd.DataFrame(LOG), "log.csv")
    (h.folder / "empty").mkdir()
    experiments = REPOSITORY / "experiments"
    shutil.copy(experiments / "campaigns" / "smoke.yaml", h.folder / "campaign.yaml")
    shutil.copy(experiments / "studies" / "smoke.yaml", h.folder / "study.yaml")
    shutil.copy(RECORDED_PAGE, h.folder / "m.prom")
    h.whole("w.yaml", WATCHED)
    write_weights(h)


def write_weights(h: Hostile) -> None:
    """Write a PEFT adapter, and a checkpoint before and after it was tuned."""
    layer = "layers.0.v_proj"
    tensors = {
        "adapter/adapter_model": {f"{layer}.lora_A": np.eye(4, 8), f"{layer}.lora_B": np.eye(8, 4)},
        "base/model": {layer: np.zeros((8, 8))},
        "tuned/model": {layer: np.eye(8)},
    }
    for path, weights in tensors.items():
        file = h.folder / f"{path}.safetensors"
        file.parent.mkdir()
        write_tensors(file, [(f"{name}.weight", "F32", one) for name, one in weights.items()])
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"]}
    (h.folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _weights(h: Hostile) -> list[str]:
    """Damage the files of weights, and what tells of them."""
    write_weights(h)
    what = h.chance.choice(("adapter", "tuned"))
    if what == "adapter" and h.chance.random() < 0.5:
        h.json("adapter/adapter_config.json", json_of(h.folder / "adapter/adapter_config.json"))
    else:
        (file,) = (h.folder / what).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        for _ in range(h.chance.choice((1, 3))):
            content[h.chance.randrange(len(content))] = h.chance.randrange(256)
        file.write_bytes(content[: h.chance.choice((len(content), h.chance.randrange(300)))])
    more = ["--rank", "2", "--out", "so", "--jobs", "1", "--json"]
    return [
        "shrink",
        *(["--from", "tuned", "--base", "base"] if what == "tuned" else [what]),
        *more,
    ]


def _line(h: Hostile, verb: str) -> list[str]:
    """Damage a command line; the files that it names are sound."""
    write_sound_files(h)
    arguments: list[str] = []
    options: list[list[str]] = []
    for word in shlex.split(USUAL[verb]):
        if word.startswith("--"):
            options.append([word])
        else:
            (options[-1] if options else arguments).append(word)
    kept = [option for option in options if h.chance.random() < 0.6 or option[0] in KEPT]
    line = [*arguments, *chain(*kept)]
    for _ in range(h.chance.choice((0, 1, 1, 2))):
        at, what = h.chance.randrange(len(line) + 1), h.chance.random()
        others = h.chance.choice(list(USUAL.values())).split()
        if what < 0.5 and line:
            line[at - 1] = h.text()
        elif what < 0.6:
            del line[at:]
        elif what < 0.7:
            line[at:at] = [h.chance.choice(others)]
        elif what < 0.8 and kept:
            line += h.chance.choice(kept)
        elif what < 0.9 and kept:
            line += [f"{h.chance.choice(kept)[0]}={h.text()}"]
        else:
            line[at:at] = [h.text()]
    return [verb if h.chance.random() < 0.97 else h.text(), *line]


def _some(h: Hostile, **values: Any) -> dict[str, Any]:
    """Return about half of the keys, each with one of its values."""
    return {key: h.chance.choice(of) for key, of in values.items() if h.chance.random() < 0.5}


def _traffic(h: Hostile) -> dict[str, Any]:
    lengths = h.chance.choice((LENGTHS, LOGNORMAL, {**LENGTHS, "distribution": "fixed"}))
    return {
        "adapters": h.chance.choice(([ONE], DEALT, ZIPF, SPLIT)),
        "lengths": lengths | _some(h, shared_prefix_tokens=(0, 16, 200)),
        **_some(h, base_model_request_rate=(0.0, 0.5)),
        **_some(h, arrivals=({"process": "poisson"}, ARRIVALS, {**ARRIVALS, "cv": 0.5})),
    }


def _valid(h: Hostile, verb: str) -> list[str]:
    """Ask for something that can be, as JSON."""
    flags = _some(
        h,
        max_num_seqs=(1, 8, 256),
        max_num_batched_tokens=(512, 8192),
        enable_prefix_caching=(True, False),
        max_model_len=(2048, 8192),
    )
    more = _some(h, slo=(SLO, {"ttft_ms": 1.0}, {"itl_ms": 50, "percentile": 50}), seed=(0, 1))
    more |= _some(h, gpu=("l40s", "h200", "a10g"))
    traffic = _traffic(h)
    if verb == "simulate":
        flags |= _some(h, policy=("vllm", "drain", "cost_aware", "unified_pool", "merge"))
        loras = {"max_loras": h.chance.choice((1, 2, 4)), "max_lora_rank": 16, "max_cpu_loras": 4}
        workload = {**traffic, "duration_s": h.chance.choice((0.001, 5, 60))}
        engine = {"model": LLAMA, **loras, **flags}
        fleets = ({"replicas": 1}, {"replicas": 2, "router": "round_robin"})
        content = {"engine": engine, "workload": workload, **more, **_some(h, fleet=fleets)}
        return [verb, h.whole("c.yaml", content), "--json"]
    if verb in ("recommend", "place"):
        more |= _some(h, engine=(flags,), slots=([1, 2],))
        content = {"model": LLAMA, "slo": "none", **traffic, **more}
        return [verb, h.whole("d.yaml", content), "--json", *(("--jobs", "1") * (verb == "place"))]
    if verb == "optimum":
        slo = h.whole("slo.yaml", more["slo"]) if "slo" in more else "none"
        rates, ranks = h.chance.choice(("0.1", "5-0.1", "900")), h.chance.choice(("8", "8-16-64"))
        grids = ["--served-grid", "2,8", "--slots-grid", h.chance.choice(("1", "2,8"))]
        asked = ["--model", LLAMA, "--rates", rates, "--ranks", ranks, "--slo", slo]
        return [verb, *asked, *grids, "--jobs", "1", "--json"]
    if verb == "memory":
        model = h.chance.choice(
            sorted(path.stem for path in (datasets.SHIPPED / "models").glob("*"))
        )
        gpu = h.chance.choice(("l40s", "8", "24", "h200", "rtx-4090"))
        told = _some(
            h, max_loras=("0", "8", "64"), max_lora_rank=("8", "64"), engine=("vllm-0.8.5",)
        )
        words = (word for key, one in told.items() for word in (f"--{key.replace('_', '-')}", one))
        return [verb, model, "--gpu", gpu, *words, "--json"]
    rows = h.chance.choice((1, 2, 30))
    columns = {
        "arrival_s": sorted(h.chance.uniform(0, 100) for _ in range(rows)),
        "prompt_tokens": [h.chance.randrange(1, 500) for _ in range(rows)],
        "output_tokens": [h.chance.randrange(1, 500) for _ in range(rows)],
        **_some(h, adapter=(["a"] * rows, [""] * rows), session_id=(["x"] * rows,)),
    }
    h.write(pd.DataFrame(columns), "log.csv")
    return [verb, "log.csv", "--json"]


KINDS: dict[str, Callable[..., list[str]]] = (
    {
        f"valid {verb}": partial(_valid, verb=verb)
        for verb in ("simulate", "recommend", "place", "optimum", "memory", "traffic")
    }
    | {f"line of {verb}": partial(_line, verb=verb) for verb in USUAL}
    | {
        maker.__name__.strip("_"): maker
        for maker in (
            *(
                _simulate,
                _simulate_options,
                _calibration,
                _demand,
                _place,
                _trace,
                _runs,
                _measured,
            ),
            *(_benchmark, _optimum, _memory, _folders, _sweep, _sweep_folder, _campaign, _study),
            *(_calibrate, _watch, _weights),
        )
    }
)
