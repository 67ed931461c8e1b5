"""Adapters told by PEFT folders, tables, shares of the traffic and vLLM's own command lines."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.plan.commands import vllm_args
from adapter_twin.plan.demand import load_demand
from adapter_twin.workload.adapter_folders import read_adapter
from adapter_twin.workload.adapters import Adapter, split_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.serve_command import lora_modules
from adapter_twin.workload.traffic import Workload

LLAMA = "llama-3.1-8b-instruct"
QKV = ("q_proj", "k_proj", "v_proj")
PEFT = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "meta-llama/Llama-3.1-8B",
    "bias": "none",
    "init_lora_weights": True,
    "lora_alpha": 32,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 16,
    "rank_pattern": {},
    "target_modules": ["v_proj", "q_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
"""What PEFT writes beside an adapter's weights."""
LENGTHS = {"mean_input_tokens": 223, "mean_output_tokens": 198}


def header(ranks: dict[str, int], width: int = 4096) -> bytes:
    """Return a safetensors file of two layers as far as its header; no weights follow."""
    tensors: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for layer in (0, 1):
        for module, rank in ranks.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora"
            sides = {"A": [rank, width], "B": [width, rank]}
            for side, shape in sides.items():
                about = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
                tensors[f"{name}_{side}.weight"] = about
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


Write = Callable[..., Path]


@pytest.fixture
def adapter(tmp_path: Path) -> Write:
    """Write a PEFT adapter below ``adapters``; without weights where there is no header."""

    def write(name: str, weights: bytes | None = None, **changes: Any) -> Path:
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(PEFT | changes))
        if weights is not None:
            (folder / "adapter_model.safetensors").write_bytes(weights)
        return folder

    return write


def scenario(folder: Path, adapters: object, vllm_args: str | None = None) -> Workload:
    content = {
        "engine": {"model": LLAMA, "max_loras": 2, "max_lora_rank": 64},
        "workload": {"adapters": adapters, "duration_s": 60, "lengths": LENGTHS},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_scenario(folder / "config.yaml", vllm_args).workload


def rates(adapters: Sequence[Adapter]) -> dict[str, float]:
    return {one.name: one.request_rate for one in adapters}


# What a folder tells.


def test_a_folder_tells_the_largest_rank_and_its_modules(adapter: Write) -> None:
    told = read_adapter(adapter("sql", rank_pattern={"layers.0.self_attn.q_proj": 32}), LLAMA)
    assert told == {"rank": 32, "target_modules": ["q_proj", "v_proj"]}


def test_the_weights_tell_the_modules_that_were_trained(adapter: Write) -> None:
    folder = adapter("sql", header(dict.fromkeys(QKV, 16)), target_modules="all-linear")
    told = {"rank": 16, "target_modules": sorted(QKV), "layers": 2}
    assert read_adapter(folder, LLAMA) == told


@pytest.mark.parametrize(
    ("chosen", "layers"), [(None, None), (5, 1), ([0, 1, 2], 3), ([0, 0, 31], 2)]
)
def test_a_configuration_tells_the_layers_that_were_trained(
    adapter: Write, chosen: object, layers: int | None
) -> None:
    assert read_adapter(adapter("sql", layers_to_transform=chosen), LLAMA).get("layers") == layers


@pytest.mark.parametrize("base", [None, "/models/ours", "unsloth/a-fine-tune", "llama-3.1-8b"])
def test_adapters_of_the_same_shape_fit(adapter: Write, base: str | None) -> None:
    assert read_adapter(adapter("sql", base_model_name_or_path=base), LLAMA)["rank"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "vLLM takes no adapter with use_dora = True; leave it out"),
        ({"bias": "all"}, "no adapter with bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "no adapter with modules_to_save"),
        ({"init_lora_weights": "pissa"}, "no adapter with init_lora_weights = 'pissa'"),
        ({"r": 0}, r"adapter_config.json.r: must be at least 1"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern.q_proj: expected a whole number"),
        ({"peft_type": "IA3"}, "no LoRA of PEFT"),
        ({"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct"}, "an adapter of Qwen/"),
        ({"target_modules": r".*\.q_proj"}, "target_modules is a pattern, .* add adapter_model"),
        ({"weights": header({"q_proj": 64})}, "weights have rank 64, above the 16 of adapter_conf"),
        ({"weights": header({"q_proj": 16}, 3584)}, r"states of \{3584\}, not those of llama"),
        ({"weights": header({})}, "holds no LoRA weights"),
        ({"weights": b"\xff" * 16}, "no safetensors file"),
        ({"weights": (99).to_bytes(8, "little") + b"{"}, "no safetensors file"),
        ({"weights": b""}, "no safetensors file"),
    ],
)
def test_what_vllm_would_not_load_is_refused_by_name(
    adapter: Write, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        read_adapter(adapter("sql", **changes), LLAMA)
    assert "\n" not in str(caught.value)


def test_an_adapted_vocabulary_is_told(adapter: Write) -> None:
    weights = header({"q_proj": 16}).replace(
        b"self_attn.q_proj.lora_A", b"embed_tokens.lora_embedding_A"
    )
    size = (len(weights) - 8).to_bytes(8, "little")
    assert read_adapter(adapter("sql", size + weights[8:]), LLAMA)["target_modules"] == [
        "embed_tokens"
    ]


def test_no_more_of_the_weights_is_read_than_their_header(adapter: Write, tmp_path: Path) -> None:
    folder = adapter("sql", (1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(AdapterTwinError, match="no safetensors file"):
        read_adapter(folder, LLAMA)


# Files.


def test_an_adapter_with_a_path_needs_no_rank(adapter: Write, tmp_path: Path) -> None:
    adapter("sql")
    adapter("law", r=64)
    listed = [
        {"path": "adapters/sql", "request_rate": 0.5},
        {"name": "lex", "path": "adapters/law", "rank": 64, "request_rate": 0.25},
        {"name": "plain", "rank": 8, "request_rate": 0.1},
    ]
    sql, lex, plain = scenario(tmp_path, listed).adapters
    assert (sql.name, sql.rank, sql.target_modules) == ("sql", 16, ("q_proj", "v_proj"))
    assert (lex.name, lex.rank, plain.path) == ("lex", 64, None)
    assert Path(sql.path or "") == tmp_path / "adapters/sql"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"rank": 8}, r"workload.adapters\[0\].rank: got 8, but .*sql has 16; leave it out"),
        ({"target_modules": ["q_proj"]}, r"adapters\[0\].target_modules: got \['q_proj'\], but"),
        ({"path": "adapters/sq"}, r"adapters\[0\].path: .*sq holds no adapter_config.json; corr"),
        ({"path": 3}, r"adapters\[0\]"),
    ],
)
def test_what_contradicts_a_folder_is_refused(
    adapter: Write, tmp_path: Path, item: dict[str, Any], message: str
) -> None:
    adapter("sql")
    with pytest.raises(AdapterTwinError, match=message):
        scenario(tmp_path, [{"path": "adapters/sql", "request_rate": 1.0, **item}])


def test_an_adapter_that_lies_elsewhere_tells_its_rank(tmp_path: Path) -> None:
    told = {"name": "sql", "path": "acme/sql-lora", "rank": 8, "request_rate": 1.0}
    (sql,) = scenario(tmp_path, [told]).adapters
    assert (sql.path, sql.rank, sql.target_modules) == ("acme/sql-lora", 8, None)


@pytest.mark.parametrize("folders", ["adapters", ["adapters/a", "adapters/b", "adapters/c"]])
@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"request_rates": [0.2, 0.1]}, [0.2, 0.1, 0.2]),
        ({"total_request_rate": 11, "zipf_exponent": 1}, [6, 3, 2]),
        ({"total_request_rate": 10, "traffic_split": {"c": 0.5, "a": 0.3, "b": 0.2}}, [3, 2, 5]),
    ],
)
def test_rates_are_dealt_over_folders(
    adapter: Write, tmp_path: Path, folders: object, form: dict[str, Any], expected: list[float]
) -> None:
    for name, rank in zip("bca", (8, 32, 16), strict=True):
        adapter(name, r=rank)
    found = scenario(tmp_path, {"folders": folders, **form}).adapters
    by_name = {one.name: (one.rank, one.request_rate) for one in found}
    wanted = zip((16, 8, 32), map(pytest.approx, expected), strict=True)
    assert by_name == dict(zip("abc", wanted, strict=True))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"folders": "none"}, "workload.adapters.folders: no PEFT adapter in .*none; correct it"),
        ({"folders": 3}, "workload.adapters.folders: expected a folder of adapters, or a list"),
        ({"ranks": [8]}, "workload.adapters.ranks: the folders tell; leave it out"),
        ({"request_rat": [1]}, "request_rat"),
        ({"traffic_split": {"b": 1.0}}, "traffic_split: name each of a, and no other"),
    ],
)
def test_folders_tell_all_but_the_rates(
    adapter: Write, tmp_path: Path, form: dict[str, Any], message: str
) -> None:
    adapter("a")
    with pytest.raises(AdapterTwinError, match=message):
        scenario(tmp_path, {"folders": "adapters", "total_request_rate": 1, **form})


def test_a_log_gives_folders_their_rates(adapter: Write, tmp_path: Path) -> None:
    adapter("law")
    adapter("sql")
    rows = [f"{t},{'law' if t % 4 else 'sql'},10,20" for t in range(100)]
    text = "arrival_s,adapter,prompt_tokens,output_tokens\n" + "\n".join(rows)
    (tmp_path / "log.csv").write_text(text)
    (tmp_path / "plan.yaml").write_text(
        f"model: {LLAMA}\nadapters: {{folders: adapters}}\nrequest_log: log.csv\n"
    )
    demand = load_demand(tmp_path / "plan.yaml")
    assert rates(demand.adapters) == pytest.approx({"law": 0.75, "sql": 0.25})
    assert demand.max_lora_rank == 16


def test_a_table_lists_adapters_beside_itself(adapter: Write, tmp_path: Path) -> None:
    adapter("law", r=64)
    rows = "name, rank, request_rate, path\nsql, 8, 0.5,\n7, , 1, law\n"
    (tmp_path / "adapters" / "all.csv").write_text(rows)
    sql, law = scenario(tmp_path, "adapters/all.csv").adapters
    assert (sql.name, sql.rank, sql.request_rate, sql.path) == ("sql", 8, 0.5, None)
    assert (law.name, law.rank, law.request_rate) == ("7", 64, 1.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("name,rank,request_rate\nsql,8.5,1\n", r"adapters\[0\].rank: expected a whole number"),
        ("name,rank,rate\nsql,8,1\n", r"adapters\[0\].*request_rate: missing|rate: unknown"),
        ("name,rank,request_rate\nsql,,1\n", r"adapters\[0\].rank: missing; add this key"),
        ("", "all.csv: cannot be read"),
    ],
)
def test_a_table_is_checked_like_a_list(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "all.csv").write_text(rows)
    with pytest.raises(AdapterTwinError, match=message) as caught:
        scenario(tmp_path, "all.csv")
    assert "\n" not in str(caught.value)


# Shares of the traffic.


def test_traffic_is_split_by_name(tmp_path: Path) -> None:
    split = {"movie": 0.75, "consumer": 0.25}
    form = {"traffic_split": split, "total_request_rate": 8, "ranks": [8, 16]}
    found = scenario(tmp_path, form).adapters
    assert rates(found) == {"movie": 6.0, "consumer": 2.0}
    assert [one.rank for one in found] == [8, 16]


@pytest.mark.parametrize("split", [{"a": 0.5, "b": 0.4}, {"a": 1.5}, {}])
def test_shares_that_are_no_whole_are_refused(split: dict[str, float]) -> None:
    with pytest.raises(AdapterTwinError, match=r"^traffic_split"):
        split_adapters(split, 1.0, [8])


# Command lines.

SERVE = f"vllm serve {LLAMA} --enable-lora --max-loras 2 --max-lora-rank 64 "


def test_the_commands_adapters_are_those_of_the_file(adapter: Write, tmp_path: Path) -> None:
    paths = {name: adapter(name, r=rank) for name, rank in (("a", 8), ("b", 64))}
    command = f"{SERVE} --lora-modules a={paths['a']} " + shlex.quote(
        json.dumps({"name": "b", "path": str(paths["b"]), "base_model_name": LLAMA})
    )
    dealt = scenario(tmp_path, {"request_rates": [1, 2]}, command).adapters
    assert [(one.name, one.rank, one.request_rate) for one in dealt] == [("a", 8, 1), ("b", 64, 2)]
    (b, idle) = scenario(tmp_path, [{"name": "b", "request_rate": 1}], command).adapters
    assert (b.rank, idle.name, idle.rank, idle.request_rate) == (64, "a", 8, 0)


@pytest.mark.parametrize(
    ("adapters", "modules", "message"),
    [
        ([{"name": "c", "request_rate": 1}], "a=/x", "'c' is not in --lora-modules; use one of a"),
        ([{"name": "a", "request_rate": 1}], "a=/x", "/x holds no adapter_config.json"),
        ([{"name": "a", "path": "/y"}], "a=/x", "adapters: the --lora-modules tell path; leave it"),
        (["a"], "a=/x", r"adapters\[0\]: expected a mapping"),
        ({"count": 1, "request_rates": [1], "ranks": [8]}, "a=/x", "count: the folders tell"),
        ({"folders": "x", "request_rates": [1]}, "a=/x", "folders: the --lora-modules tell"),
        ([], "/x", "--lora-modules: '/x' is neither name=path nor JSON"),
        ([], "a=/x,b=/y", "--lora-modules: 'a=/x,b=/y' is neither"),
    ],
)
def test_a_command_that_names_others_is_refused(
    tmp_path: Path, adapters: object, modules: str, message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message):
        scenario(tmp_path, adapters, f"{SERVE} --lora-modules {modules} --port 8000")


def test_a_command_for_another_machine_needs_ranks(tmp_path: Path) -> None:
    listed = [{"name": "a", "rank": 8, "request_rate": 1}]
    (a,) = scenario(tmp_path, listed, f"{SERVE} --lora-modules a=/srv/a").adapters
    assert (a.rank, a.path) == (8, "/srv/a")


def test_a_printed_command_names_the_adapters_and_is_read_back() -> None:
    engine = EngineConfig(model=LLAMA, max_loras=2, max_lora_rank=8, lora_modules="all")
    laws = load_calibration("auto", LLAMA)
    paths = {"sql": "/adapters/sql", "law": "/adapters/law, tax"}
    adapters = [Adapter(name=n, path=p, rank=8, request_rate=1) for n, p in paths.items()]
    words = vllm_args(engine, laws, adapters)
    assert "sql=/adapters/sql" in words
    assert lora_modules(shlex.join(["vllm", "serve", LLAMA, *words])) == paths
    unnamed = [*adapters, Adapter(name="x", rank=8, request_rate=1)]
    assert "--lora-modules" not in vllm_args(engine, laws, unnamed)
    assert "--lora-modules" not in vllm_args(
        EngineConfig(model=LLAMA, max_loras=2, max_lora_rank=8), laws, adapters
    )
