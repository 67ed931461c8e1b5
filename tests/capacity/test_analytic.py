"""The analytic model agrees with the twin where it claims to, and names what binds."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from adapter_twin.capacity import traffic_mix
from adapter_twin.capacity.analytic import analyse, predict_analytic
from adapter_twin.capacity.slot_sharing import share_slots
from adapter_twin.capacity.traffic_mix import read_runs
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.laws.linear_steps import LinearStepLaw
from adapter_twin.plan.grid import grid_runs
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.service.metrics import service_of
from adapter_twin.service.predict import predict
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import records, run_to_workload
from adapter_twin.workload.traffic import Lengths, Workload

LLAMA = "llama-3.1-8b-instruct"
MIX: dict[str, Any] = {
    "model": LLAMA,
    "ranks": "8-16",
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 200.0,
}


def grid(rates: str, served: list[int], slots: list[int]) -> pd.DataFrame:
    return grid_runs(MIX | {"rates_per_adapter": rates}, served, slots, 3600.0)


@pytest.mark.parametrize(
    ("rates", "served", "slots"),
    [
        ("0.1-0.05-0.025", 96, 96),
        ("0.4-0.1-0.05", 64, 32),
        ("0.05-0.0125", 384, 64),
        ("0.1-0.05-0.025", 192, 96),
    ],
    ids=["every adapter has a slot", "some wait", "many wait", "chains in most steps"],
)
def test_it_agrees_with_the_twin_where_it_holds(rates: str, served: int, slots: int) -> None:
    runs = grid(rates, [served], [slots])
    ours, twin = predict_analytic(runs).iloc[0], predict(runs, observer=False, jobs=1).iloc[0]
    assert ours["holds"]
    assert ours["total_throughput"] == pytest.approx(twin["total_throughput"], rel=0.03)
    assert ours["mean_itl_ms"] == pytest.approx(twin["mean_itl_ms"], rel=0.06)
    assert ours["starved"] == twin["starved"]


def test_an_overloaded_engine_serves_its_capacity() -> None:
    runs = grid("1.6", [16], [16]).assign(rates_per_adapter="3.2")
    ours, twin = predict_analytic(runs).iloc[0], predict(runs, observer=False, jobs=1).iloc[0]
    assert ours["starved"]
    assert ours["capacity_tokens_per_s"] == pytest.approx(twin["total_throughput"], rel=0.05)


@pytest.mark.parametrize(
    ("rates", "served", "slots", "engine", "binds"),
    [
        ("0.01", 64, 64, {}, "arrival"),
        ("0.4", 128, 128, {}, "kv"),
        ("3.2", 64, 64, {"max_num_seqs": 32}, "requests"),
        ("3.2", 64, 16, {"mean_input_tokens": 2000.0}, "compute"),
        ("0.4", 64, 2, {}, "slots"),
    ],
)
def test_it_names_what_binds(
    rates: str, served: int, slots: int, engine: dict[str, Any], binds: str
) -> None:
    runs = grid(rates, [served], [slots]).assign(**engine)
    assert predict_analytic(runs)["binds"].item() == binds


def test_more_load_means_more_utilisation_and_slower_tokens() -> None:
    tables = [predict_analytic(grid(f"{rate:.3f}", [64], [32])) for rate in (0.01, 0.05, 0.1, 0.2)]
    for column in ("utilisation", "mean_itl_ms", "running", "distinct_adapters"):
        values = [table[column].item() for table in tables]
        assert np.all(np.diff(values) > 0), column


def test_a_refused_start_has_no_figures() -> None:
    row = predict_analytic(
        grid_runs(MIX | {"ranks": "32", "rates_per_adapter": "0.01"}, [384], [384], 60.0)
    ).iloc[0]
    assert not row["feasible_start"]
    assert row["starved"]
    assert not row["holds"]
    assert np.isnan(row["total_throughput"])


def test_rows_keep_their_index_and_do_not_depend_on_each_other() -> None:
    runs = pd.concat([grid("0.1-0.05", [64, 32], [16, 32]), grid("0.4", [32], [32])])
    runs = runs.set_axis(list("edcba"), axis=0)
    together = predict_analytic(runs)
    assert together.index.tolist() == list("edcba")
    apart = pd.concat([predict_analytic(runs.loc[[name]]) for name in runs.index])
    pd.testing.assert_frame_equal(together, apart, rtol=1e-9)


def test_concrete_adapters_are_analysed_like_rows() -> None:
    runs = grid("0.1-0.05-0.025", [48], [16, 32])
    workload = Workload(
        adapters=deal_adapters(48, [0.1, 0.05, 0.025], [8, 16]),
        duration_s=3600,
        lengths=Lengths(mean_input_tokens=223, mean_output_tokens=200),
    )
    engines = [
        EngineConfig(model=LLAMA, max_loras=slots, max_cpu_loras=48, max_lora_rank=16)
        for slots in (16, 32)
    ]
    table = analyse(workload, engines, load_calibration("auto", LLAMA))
    pd.testing.assert_frame_equal(table, predict_analytic(runs).reset_index(drop=True))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"rates_per_adapter": "0.1-0.0-0.1", "ranks": "8"},
    {"rates_per_adapter": "0.02", "zipf_exponent": 1.1, "arrival_cv": 2.0},
    {"duration_s": np.nan, "mean_input_tokens": np.nan, "zipf_exponent": np.nan},
    {"length_distribution": "lognormal", "length_cv": 0.5, "block_size": 32.0},
    {"max_num_seqs": 4096, "max_num_batched_tokens": np.nan},
    {"max_num_seqs": "64", "max_num_batched_tokens": "512"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_are_read_as_the_twin_reads_them(options: dict[str, Any]) -> None:
    runs = grid("0.1-0.05-0.025", [64, 32], [16, 32]).assign(**options)
    for row, (engine, traffic) in zip(records(runs), read_runs(runs), strict=True):
        expected_engine, workload = run_to_workload(row)
        expected = traffic_mix.Traffic.of(workload)
        assert engine == expected_engine
        assert traffic[2:] == expected[2:]
        np.testing.assert_allclose(traffic.rates, expected.rates)
        np.testing.assert_array_equal(traffic.adapters, expected.adapters)


@pytest.mark.parametrize(
    ("column", "cell", "complaint"),
    [
        ("ranks", "8-64", "max_lora_rank"),
        ("adapter_slots", 64, "max_loras"),
        ("duration_s", -1.0, "duration_s"),
        ("max_num_seqs", 2.5, "whole number"),
    ],
)
def test_a_bad_row_is_named(column: str, cell: object, complaint: str) -> None:
    runs = grid("0.1", [16, 32], [16]).astype({column: object})
    runs.loc[1, column] = cell
    with pytest.raises(AdapterTwinError, match=f"run N=32 G=16: .*{complaint}"):
        predict_analytic(runs)


def test_similar_rates_may_be_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid("0.05", [384, 96], [4, 16, 96]).assign(zipf_exponent=0.9)
    together = predict_analytic(runs)
    monkeypatch.setattr(traffic_mix, "DISTINCT_RATES", 1000)
    apart = predict_analytic(runs)
    assert together["starved"].any()
    assert (together["slot_wait_s"] > 0).any()
    exact = ["total_throughput", "mean_itl_ms", "distinct_adapters"]
    pd.testing.assert_frame_equal(together[exact], apart[exact], rtol=1e-3)
    waits = ["mean_ttft_ms", "slot_wait_s"]
    pd.testing.assert_frame_equal(together[waits], apart[waits], rtol=5e-3)


@pytest.mark.parametrize(
    ("feature", "multiplier", "ms"),
    [
        ("launch", "G", 0.2),
        ("launch", "GR", 0.005),
        ("tokens", "1", 0.15),
        ("decodes", "1", 0.2),
        ("context_tokens", "1", 0.001),
        ("adapters", "R", 0.02),
        ("adapters_tokens", "1", 0.01),
        ("tokens", "GR", 0.0002),
        ("adapted", "1", 4.0),
        ("adapted_tokens", "R", 0.003),
    ],
)
def test_every_term_of_the_step_law_costs_what_it_does_in_the_twin(
    feature: str, multiplier: str, ms: float
) -> None:
    law = LinearStepLaw()
    law.token_breaks_ = [64.0]
    costs = {("launch", "1"): (10.0, 15.0), (feature, multiplier): (ms, 2 * ms)}
    law.terms_ = [
        {"regime": regime, "feature": name, "multiplier": factor, "ms": cost}
        for (name, factor), regimes in costs.items()
        for regime, cost in enumerate(regimes)
    ]
    calibration = warmed_up(replace(load_calibration("auto", LLAMA), step_time=law))
    workload = Workload(
        adapters=deal_adapters(24, [0.1], [16]),
        duration_s=1200.0,
        lengths=Lengths(mean_input_tokens=223, mean_output_tokens=200),
    )
    engine = EngineConfig(model=LLAMA, max_loras=24, max_cpu_loras=24, max_lora_rank=32)
    gaps = simulate(workload, engine, calibration).gaps
    itl_ms = 1e3 * np.average(gaps.gap_s, weights=gaps.count)
    found = analyse(workload, [engine], calibration).mean_itl_ms[0]
    assert found == pytest.approx(itl_ms, rel=0.03)
    law.terms_ = law.terms_[:2]  # without the term
    assert analyse(workload, [engine], calibration).mean_itl_ms[0] < 0.92 * found


def test_traffic_to_the_base_model_waits_for_no_slot() -> None:
    def service(base_rate: float) -> pd.Series:
        workload = Workload(
            adapters=deal_adapters(64, [0.1], [16]),
            duration_s=3600,
            lengths=Lengths(mean_input_tokens=223, mean_output_tokens=200),
            base_model_request_rate=base_rate,
        )
        engine = EngineConfig(model=LLAMA, max_loras=16, max_cpu_loras=64, max_lora_rank=16)
        return analyse(workload, [engine], load_calibration("auto", LLAMA)).iloc[0]

    with_base, without = service(4.0), service(0.0)
    added = with_base["total_throughput"] - without["total_throughput"]
    assert added == pytest.approx(4.0 * 423, rel=0.05)


def test_enough_slots_mean_no_wait_and_too_few_the_longest() -> None:
    rates, adapters = np.full((2, 1), 0.05), np.full((2, 1), 64.0)
    visits = share_slots(np.array([64.0, 1.0]), rates, adapters, np.full(2, 20.0), np.full(2, 1e3))
    assert visits.head_wait_s[0] == 0
    assert visits.wait_s[0, 0] == 0
    assert visits.head_wait_s[1] == pytest.approx(1e3, rel=0.01)
    assert visits.admitted[0, 0] == 1
    assert visits.admitted[1, 0] < 1


def test_an_ungated_visit_is_the_busy_period_of_m_g_infinity() -> None:
    rate, residence_s = 0.05, 20.0
    visits = share_slots(
        np.array([64.0]), np.array([[rate]]), np.array([[1.0]]), np.array([residence_s]), np.ones(1)
    )
    busy_s = np.expm1(rate * residence_s) / rate
    assert visits.per_s[0] == pytest.approx(1 / (1 / rate + busy_s), rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tensor_parallel_size": 2}, r"^engine.tensor_parallel_size: .* was measured without"),
        ({"specialize_active_lora": True}, r"^engine.specialize_active_lora: vLLM 0.8.5 has no"),
        ({"max_model_len": 200_000}, r"^engine.max_model_len: 200000 is above"),
    ],
)
def test_it_refuses_the_flags_that_the_twin_refuses(flags: dict[str, Any], message: str) -> None:
    engine = EngineConfig(model=LLAMA, max_loras=8, **flags)
    lengths = Lengths(mean_input_tokens=223, mean_output_tokens=200)
    workload = Workload(adapters=deal_adapters(8, [0.1], [8]), duration_s=60, lengths=lengths)
    laws = load_calibration("auto", LLAMA)
    for ask in (
        lambda: analyse(workload, [engine], laws),
        lambda: simulate(workload, engine, laws),
    ):
        with pytest.raises(AdapterTwinError, match=message):
            ask()


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_an_engine_without_slots_launches_no_adapter_kernels() -> None:
    lengths = Lengths(mean_input_tokens=223, mean_output_tokens=200)
    workload = Workload(adapters=(), duration_s=900, lengths=lengths, base_model_request_rate=8.0)
    laws = load_calibration("auto", LLAMA)
    engines = [EngineConfig(model=LLAMA, max_loras=slots) for slots in (0, 32)]
    none, idle = analyse(workload, engines, laws).mean_itl_ms
    twin = service_of(simulate(workload, engines[0], laws), warm_up_s=100.0)
    assert none == pytest.approx(twin["mean_itl_ms"], rel=0.06)
    assert none < idle
