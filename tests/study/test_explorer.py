"""The capacity explorer: its table holds the command's answers, its page what the table holds."""

import base64
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.plan.commands import vllm_args
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.grid import GRID, MAX_NUM_SEQS
from adapter_twin.plan.optimum import optimum
from adapter_twin.tables import datasets
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.scenario import Slo
from study import explorer

LLAMA, QWEN = explorer.MODELS
FAST = Slo(ttft_ms=500, itl_ms=50, percentile=95)
STRICT = Slo(ttft_ms=200, itl_ms=30, percentile=99.9)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return datasets.read_table(explorer.TABLE, explorer.EXPLORER)


@pytest.fixture(scope="module")
def page(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("page") / "data.js"
    explorer.write_page_data(table, path)
    script = path.read_text()
    return json.loads(script.removeprefix("const EXPLORER = ").removesuffix(";\n"))


def setting(model: str, rates: str, ranks: str, lengths: tuple[float, float]) -> dict[str, Any]:
    wanted = {"model": model, "rates_per_adapter": rates, "ranks": ranks}
    wanted |= dict(zip(("mean_input_tokens", "mean_requested_output_tokens"), lengths, strict=True))
    assert wanted in explorer.workloads()
    return wanted


def test_the_table_holds_every_setting_on_every_configuration(table: pd.DataFrame) -> None:
    pairs = [(n, g) for n, g in product(GRID, GRID) if g <= n]
    columns = [*explorer.workloads()[0], "served_adapters", "adapter_slots"]
    expected = [(*mix.values(), *pair) for mix in explorer.workloads() for pair in pairs]
    assert list(table[columns].itertuples(index=False, name=None)) == expected


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
@pytest.mark.parametrize(
    ("workload", "slo", "served"),
    [
        (setting(LLAMA, "0.1-0.05-0.025", "8-16-32", (223, 200)), None, (256, 320, 384)),
        (setting(QWEN, "0.4", "32", (223, 200)), FAST, GRID),
        (setting(QWEN, "0.025", "16", (1024, 400)), FAST, (32, 96)),
        (setting(LLAMA, "0.4-0.1-0.025", "8", (64, 50)), None, (96, 128)),
        (setting(LLAMA, "0.1", "16", (223, 200)), Slo(itl_ms=50, percentile=90), (64, 96)),
        (setting(LLAMA, "1.6-0.4-0.1", "16", (1024, 400)), None, GRID),
        (setting(QWEN, "0.0125", "8", (64, 50)), STRICT, (320, 384)),
        (setting(LLAMA, "0.05", "8-16-32", (223, 200)), STRICT, (128, 256)),
    ],
)
def test_the_table_recommends_what_the_command_does(
    table: pd.DataFrame, workload: dict[str, Any], slo: Slo | None, served: tuple[int, ...]
) -> None:
    criterion = Criterion(margin=MARGIN, slo=slo)
    runs = explorer.runs_of(table, workload, slo)
    ranked = criterion.ranked(runs[runs.served_adapters.isin(served)])
    options = {"served_grid": served, "criterion": criterion, "jobs": 1}
    if ranked.empty:
        with pytest.raises(AdapterTwinError):
            optimum(workload, **options)
        return
    found, best = optimum(workload, **options), ranked.iloc[0]
    assert found["served_adapters"] == best.served_adapters
    tied = ranked[ranked.tied & (ranked.served_adapters == best.served_adapters)]
    own = tied[tied.adapter_slots == found["adapter_slots"]]
    assert len(own) == 1, "the command chooses among ties by a higher load, too"
    assert own.mean_ttft_ms.iloc[0] <= 1.25 * tied.mean_ttft_ms.min()
    assert own.total_throughput.iloc[0] == pytest.approx(found["total_throughput"], rel=0.05)


@given(st.floats(0, 1), st.integers(1, 9999))
def test_rounding_down_to_hundredths_changes_no_verdict(share: float, hundredths: int) -> None:
    percentile = hundredths / 100
    for exact in (share, percentile / 100):
        kept = int(explorer.hundredths(pd.Series([exact]))[0])
        assert (kept >= hundredths) == (exact >= percentile / 100)
        assert (kept / 100 / 100 >= percentile / 100) == (kept >= hundredths)


def test_without_a_share_no_service_level_is_met() -> None:
    assert explorer.hundredths(pd.Series([np.nan, 1.0])).tolist() == [0, 10_000]


def test_a_small_table_survives_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: pd.DataFrame
) -> None:
    monkeypatch.setattr(explorer, "MODELS", (QWEN,))
    monkeypatch.setattr(explorer, "RATES", ("1.6-0.4-0.1",))
    monkeypatch.setattr(explorer, "RANKS", ("32",))
    monkeypatch.setattr(explorer, "LENGTHS", ((223.0, 200.0),))
    afresh = explorer.explore(jobs=1)
    path = datasets.write_table(explorer.compact(afresh), tmp_path / "small.parquet")
    stored = datasets.read_table(path, explorer.EXPLORER)
    recorded = explorer.runs_of(table, explorer.workloads()[0]).reset_index(drop=True)
    pd.testing.assert_frame_equal(stored, recorded, check_categorical=False, rtol=1e-6)
    assert 0 < stored.simulated.sum() < stored.feasible_start.sum() < len(stored)
    np.testing.assert_allclose(stored.total_throughput, afresh.total_throughput, rtol=1e-7)


def unpack(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_the_page_gets_the_whole_table(table: pd.DataFrame, page: dict[str, Any]) -> None:
    states = np.array(page["states"])[unpack(page["state"], "u1")]
    np.testing.assert_array_equal(states == "simulated", table.simulated)
    np.testing.assert_array_equal(states == "refused", ~table.feasible_start)
    simulated = table[table.simulated]
    for name, figure in page["figures"].items():
        np.testing.assert_array_equal(unpack(figure["values"], "<f4"), simulated[name])
    for (i, ttft), (j, itl) in product(
        enumerate(explorer.TTFT_LIMITS_MS), enumerate(explorer.ITL_LIMITS_MS)
    ):
        if (ttft, itl) != (None, None):
            kept = unpack(page["met"][i][j], "<u2")
            np.testing.assert_array_equal(kept, simulated[explorer.met(ttft, itl)])
    offered = unpack(page["offered"], "<f4").reshape(-1, len(page["grid"]))
    per_run = [offered[i // 55, GRID.index(n)] for i, n in enumerate(table.served_adapters)]
    np.testing.assert_array_equal(per_run, table.offered_tokens_per_s)


def test_the_page_knows_the_flags_and_the_rule(page: dict[str, Any]) -> None:
    engine = EngineConfig(
        model=LLAMA, max_loras=64, max_cpu_loras=96, max_lora_rank=32, max_num_seqs=MAX_NUM_SEQS
    )
    flags = page["vllm"].format(
        adapter_slots=64, served_adapters=96, max_lora_rank=32, max_model_len=131072
    )
    assert flags.replace("\\\n", "").split()[3:] == vllm_args(
        engine, load_calibration("auto", LLAMA)
    )
    with_slo = page["criterion"]["slo"].format(percentile="99.9", limits="TTFT 200 ms, ITL 30 ms")
    assert with_slo == str(Criterion(margin=MARGIN, slo=STRICT))
    assert page["criterion"]["plain"] == str(Criterion(margin=MARGIN))
    assert page["max_lora_rank"] == [8, 16, 32, 32]


def test_the_page_says_what_is_extrapolated(page: dict[str, Any]) -> None:
    per_setting = np.array(page["extrapolations"], dtype=object).reshape(2, 4, 3)
    assert per_setting[0, 3, 1] == []  # the reference study's own ranks and lengths
    assert "max_lora_rank" in per_setting[1, 0, 1][0]
    assert len(per_setting[0, 1, 2]) == 2


def test_the_page_is_light(tmp_path: Path) -> None:
    out = tmp_path / "explorer_data.js"
    explorer.main(out)
    static = (datasets.REPOSITORY / "book" / "_static").glob("explorer.*")
    assert out.stat().st_size + sum(path.stat().st_size for path in static) < 900_000
