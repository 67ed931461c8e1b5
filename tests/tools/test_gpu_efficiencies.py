"""Constants of GPUs from operator tables: what made the tables is found again."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adapter_twin.workload.models import model_shape
from tools import gpu_efficiencies, operator_tables
from tools.gpu_efficiencies import fit, spreads, start_of, write
from tools.operator_tables import CONTEXTS, DECODES, PREFILLS, Tables

TRUE = {
    "bandwidth_gb_s": 3000.0,
    "kv_bandwidth_gb_s": 2800.0,
    "compute_tflops": 700.0,
    "knee": 2.2,
    "layer_ms": 0.03,
}
MODELS = ("llama-3.1-8b", "qwen-2.5-7b", "llama-3.2-3b")
VERSION = "0.24.0"


def product_ms(tokens: int, outputs: int, inputs: int) -> float:
    read = 2 * outputs * inputs / TRUE["bandwidth_gb_s"] / 1e6
    multiplied = 2 * outputs * inputs * tokens / TRUE["compute_tflops"] / 1e9
    knee = TRUE["knee"]
    return float((read**knee + multiplied**knee) ** (1 / knee) + TRUE["layer_ms"] / 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return tables that the law made, of two versions, of which one lacks attention."""
    folder = tmp_path_factory.mktemp("gpu")
    sizes = product((*DECODES, *PREFILLS), (1024, 4096, 16384, 65536), (1024, 4096, 16384))
    gemm = [("bfloat16", m, n, k, product_ms(m, n, k)) for m, n, k in {*sizes}]
    gemm += [("fp8", m, n, k, ms / 2) for _, m, n, k, ms in gemm]
    attention = [
        (batch, 1, step - 1, heads, kv, 128, dtype, "bfloat16", window, ms)
        for batch, step, heads, kv in product(DECODES, CONTEXTS, (16, 32), (4, 8))
        for dtype, window, slower in (("bfloat16", 0, 1), ("fp8", 0, 3), ("bfloat16", 128, 9))
        if batch * step < 2**20
        for ms in [
            slower * (512 * kv * batch * step / TRUE["kv_bandwidth_gb_s"] / 1e6)
            + slower * TRUE["layer_ms"] / 5
        ]
    ]
    for version in (VERSION, "0.9.1", "0.100.0"):
        path = folder / "gemm" / "vllm" / version / "gemm_perf.parquet"
        path.parent.mkdir(parents=True)
        columns = ["gemm_dtype", "m", "n", "k", "latency"]
        pd.DataFrame(gemm, columns=columns).to_parquet(path)
        if version == "0.100.0":
            continue
        path = folder / "attention" / "vllm" / version / "generation_attention_perf.parquet"
        path.parent.mkdir(parents=True)
        columns = [
            *("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim"),
            *("attn_dtype", "kv_cache_dtype", "window_size", "latency"),
        ]
        pd.DataFrame(attention, columns=columns).to_parquet(path)
    return folder


def test_a_fit_finds_the_constants_that_made_the_tables(folder: Path) -> None:
    tables = Tables.read(folder, "vllm")
    found = fit([tables.steps(model) for model in MODELS], start_of("h200"))
    for name, value in TRUE.items():  # the law reads the head, but multiplies nothing by it
        assert found[name] == pytest.approx(value, rel=0.15), name


def test_the_newest_version_with_both_tables_is_read(folder: Path) -> None:
    assert Tables.read(folder, "vllm").version == VERSION


def test_a_size_that_was_not_measured_lies_on_the_line_between_its_neighbours(folder: Path) -> None:
    tables = Tables.read(folder, "vllm")
    for outputs, inputs in ((4096, 4096), (5120, 3072), (128256, 4096)):
        measured = tables.product_ms(inputs, outputs, [8])
        assert measured == pytest.approx([product_ms(8, outputs, inputs)], rel=0.05)


def test_decodes_that_were_not_measured_are_no_steps(folder: Path) -> None:
    steps = Tables.read(folder, "vllm").steps("llama-3.1-8b")
    assert np.isfinite(steps.ms).all()
    assert steps.context.max() < 2**20
    assert (steps.context == 0).sum() == len(PREFILLS)
    per_token = model_shape("llama-3.1-8b").kv_bytes_per_token()
    at_one = (steps.tokens == 1) & (steps.context > 0)
    kv_ms = np.diff(steps.ms[at_one]) * TRUE["kv_bandwidth_gb_s"] * 1e6
    assert kv_ms == pytest.approx(np.diff(steps.context[at_one]) * per_token, rel=0.01)


def test_a_spread_is_wide_where_engines_or_models_differ() -> None:
    same = [TRUE, TRUE]
    assert max(spreads(same, same).values()) == 0
    assert spreads([TRUE, TRUE | {"knee": 4.4}], same)["knee"] == pytest.approx(np.log(2) / 2**0.5)
    # fits without one model move by 1/(n - 1) of how far it is from the others' mean
    own = np.array([0.1, -0.2, 0.3, -0.2])
    without = [TRUE | {"knee": float(np.exp(-one / 3))} for one in own]
    assert spreads(same, without)["knee"] == pytest.approx(own.std(ddof=1), rel=1e-6)


def test_a_file_keeps_all_that_is_not_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = gpu_efficiencies.GPU_FILES / "l4.json"
    before = json.loads(shipped.read_text())
    (tmp_path / "l4.json").write_text(shipped.read_text())
    monkeypatch.setattr(gpu_efficiencies, "GPU_FILES", tmp_path)
    for _ in range(2):  # the second time changes nothing
        write("l4", {name: (value, 0.1) for name, value in TRUE.items()}, "a table")
        text = (tmp_path / "l4.json").read_text()
        assert '"knee": [2.2, 0.1]' in text
        after = json.loads(text)
        assert after.pop("steps") == {name: [value, 0.1] for name, value in TRUE.items()}
        assert after.pop("steps_from") == "operators"
        assert after["sources"].pop("steps") == "a table"
        assert after == before


def test_a_folder_without_the_package_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unpack the wheel"):
        gpu_efficiencies.main(tmp_path)


def test_weights_of_neighbours_add_up_to_one() -> None:
    for size in (1, 2, 3, 8, 20):
        near = dict(operator_tables._around({2, 4, 8}, size))
        assert sum(near.values()) == pytest.approx(1)
        assert sum(one * weight for one, weight in near.items()) == pytest.approx(size)
