"""Laws by hand: what is fitted to made-up measurements, and what the twin makes of it."""

from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from adapter_twin.calibrate.client_side import fit_first_use, fit_pause_share
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.laws.emitted_lengths import EarlyStopLaw
from adapter_twin.laws.front_end import MeasurementLaw
from adapter_twin.laws.linear_steps import LinearStepLaw
from adapter_twin.laws.loading import LoadingLaw
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.laws.scheduling import SchedulingLaw
from adapter_twin.service.metrics import summarize
from adapter_twin.service.perfetto import step_starts_s
from adapter_twin.twin.simulate import draw_requests, simulate, simulate_run
from adapter_twin.workload.adapters import Adapter, deal_adapters
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.models import model_shape
from adapter_twin.workload.traffic import Lengths, Workload
from study.ch01_to_06 import configurations

LLAMA = "llama-3.1-8b-instruct"

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


@pytest.fixture(scope="module")
def shipped() -> Calibration:
    return load_calibration("auto", LLAMA)


def test_a_copy_depends_on_the_slot_and_a_read_grows_with_the_rank() -> None:
    rows = [
        ("memory", 32, 32, [7.0, 8.0, 90.0]),
        ("memory", 8, 32, [9.0, 10.0, 11.0]),  # padded
        ("disk", 8, 32, [8.0 + 24.0, 32.0, 1000.0]),  # a first read of the file
        ("disk", 32, 32, [8.0 + 36.0, 44.0, 44.0]),
    ]
    loads = pd.DataFrame(rows, columns=["source", "rank", "max_lora_rank", "load_ms"])
    law = LoadingLaw("m").fit(loads.explode("load_ms").astype({"load_ms": float}).assign(model="m"))
    ranks = np.array([8, 16, 32])
    assert law.load_s(ranks, 32) == pytest.approx([0.010, 0.010, 0.008])
    assert law.read_s(ranks) == pytest.approx([0.024, 0.028, 0.036])


def test_an_adapter_of_some_layers_is_copied_and_read_in_that_share(shipped: Calibration) -> None:
    whole = Adapter(name="a", rank=16, request_rate=1.0)
    engine = EngineConfig(model=LLAMA, max_loras=4, max_lora_rank=16)
    depth = shipped.memory.shape.layers

    def times_s(**changes: object) -> list[float]:
        times = shipped.load_times_s(engine, [replace(whole, **changes), whole])
        return [float(one[0]) for one in times]

    copy_s, read_s = times_s()
    assert times_s(layers=depth) == [copy_s, read_s]  # bit for bit
    assert times_s(layers=depth // 4)[0] == copy_s / 4
    base_s = shipped.loading.read_s(np.array([0]))[0]
    assert times_s(layers=depth // 4)[1] == pytest.approx(base_s + (read_s - base_s) / 4)
    assert times_s(layers=depth // 2, target_modules=("q_proj",))[0] == pytest.approx(copy_s / 14)
    with pytest.raises(AdapterTwinError, match=r"^a.layers: 33 are more than the 32 of the model"):
        times_s(layers=depth + 1)


def test_adapters_of_all_layers_give_the_records_of_those_that_tell_none(
    shipped: Calibration,
) -> None:
    adapters = deal_adapters(12, [0.4], [8, 16])
    told = tuple(replace(one, layers=shipped.memory.shape.layers) for one in adapters)
    few = tuple(replace(one, layers=2) for one in adapters)
    lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    engine = EngineConfig(model=LLAMA, max_loras=4, max_cpu_loras=12, max_lora_rank=16)
    whole, same, faster = (
        simulate(Workload(adapters=one, duration_s=60, lengths=lengths), engine, shipped)
        for one in (adapters, told, few)
    )
    np.testing.assert_array_equal(whole.records.end_s, same.records.end_s)
    assert 0 < np.nansum(faster.records.load_wait_s) < np.nansum(whole.records.load_wait_s)


def test_the_pause_of_a_first_use_is_found_in_the_start_of_a_run(shipped: Calibration) -> None:
    pause_ms = 200.0
    truth = replace(shipped, front_end=copy(shipped.front_end))
    truth.front_end.first_use_ms_ = pause_ms
    runs = configurations(LLAMA, [192, 384], [32], duration_s=120.0)
    series = []
    for row in runs.to_dict("records"):
        steps = simulate_run(row, truth).steps
        t_s = np.arange(0.0, 120.0, 2.0)
        running = steps.running[np.searchsorted(steps.end_s, t_s).clip(max=len(steps) - 1)]
        series.append(pd.DataFrame({"run_id": row["run_id"], "t_s": t_s, "running": running}))
    found = replace(shipped, front_end=copy(shipped.front_end))
    fit_first_use(found, runs.assign(running_mean=50.0), pd.concat(series), jobs=1)
    assert found.front_end.first_use_ms_ == pause_ms
    low, high = found.front_end.interval_["first_use_ms_"]
    assert low <= pause_ms <= high


def test_reads_of_the_metrics_take_as_long_as_their_pages() -> None:
    rng = np.random.default_rng(0)
    labels, running = rng.integers(0, 30_000, 400), rng.integers(0, 500, 400)
    names = labels * rng.integers(1, 60, 400)
    read_ms = 5 + 0.01 * labels + 1e-4 * names + 2e-5 * labels * running
    read_ms[:40] += 4000.0  # the client itself was busy
    law = MeasurementLaw().fit(labels, names, running, read_ms * rng.lognormal(0, 0.02, 400))
    fitted = law.scrape_ms_, law.scrape_ms_per_label_, law.scrape_ms_per_name_
    assert fitted == pytest.approx((5, 0.01, 1e-4), rel=0.1)
    assert law.scrape_ms_per_label_running_ == pytest.approx(2e-5, rel=0.1)


def test_the_share_of_a_read_in_which_the_server_pauses_shows_in_the_gaps_between_tokens(
    shipped: Calibration,
) -> None:
    truth = replace(shipped, measurement=copy(shipped.measurement))
    truth.measurement.scrape_pause_share_ = 0.85
    runs = configurations(LLAMA, [16, 32], [16], duration_s=600.0)
    served = [simulate_run(row, truth) for row in runs.to_dict("records")]
    p99 = [summarize(run.records, run.gaps, run.duration_s)["p99_itl_ms"] for run in served]
    found = replace(shipped, measurement=copy(shipped.measurement))
    fit_pause_share(found, runs.assign(p99_itl_ms=p99), jobs=1)
    assert found.measurement.scrape_pause_share_ == pytest.approx(0.85, abs=0.01)


def test_early_stops_are_as_many_and_as_early_as_was_counted() -> None:
    runs = pd.DataFrame(
        {
            "run_id": ["a", "b"],
            "completed_requests": [60, 40],
            "mean_requested_output_tokens": 100.0,
            "output_tokens": [5_100, 3_400],  # 1500 of 10 000 are lost
        }
    )
    counter = {"run_id": ["a", "a", "b"], "stopped_by_eos_total": [4, 15, 10]}
    law = EarlyStopLaw().fit(runs, pd.DataFrame(counter))
    assert law.probability_ == pytest.approx(0.25)
    assert law.kept_ == pytest.approx(0.4)  # 25 requests lose 60 % each
    emitted = law.apply(np.full(20_000, 1000, np.int32), np.random.default_rng(0))
    stopped = emitted[emitted < 1000]
    assert len(stopped) / 20_000 == pytest.approx(0.25, abs=0.01)
    assert stopped.mean() == pytest.approx(400, rel=0.03)
    assert stopped.max() <= 800
    assert law.apply(np.ones(100, np.int32), np.random.default_rng(0)).min() == 1


def test_the_twin_serves_outputs_that_stop_early(shipped: Calibration) -> None:
    workload = Workload(
        adapters=deal_adapters(4, [1.0], [8]),
        duration_s=600.0,
        lengths=Lengths(mean_input_tokens=100, mean_output_tokens=200),
    )
    whole, early = replace(shipped, early_stop=EarlyStopLaw.never()), EarlyStopLaw()
    early.probability_, early.kept_ = 0.5, 0.2
    requested, emitted = (
        draw_requests(workload, laws).output_tokens
        for laws in (whole, replace(shipped, early_stop=early))
    )
    assert (emitted <= requested).all()
    assert emitted.sum() / requested.sum() == pytest.approx(1 - 0.5 * 0.8, abs=0.05)


def test_the_kv_cache_holds_whole_blocks_only() -> None:
    # 32 layers x (K and V) x 8 heads x 128 x 2 bytes: 128 KiB a token
    law = MemoryLaw(model_shape(LLAMA), "0.8.5", 0.0)
    law.slots_ = "apart"
    block_gib = 16 * 128 / 2**20
    for blocks, whole in ((10.0, 10), (10.99, 10), (9.99, 9)):
        law.total_gib = blocks * block_gib
        assert law.kv_cache_tokens(EngineConfig(model=LLAMA, max_loras=4)) == 16 * whole


def test_a_step_costs_what_the_law_says_at_the_rank_of_its_slots(shipped: Calibration) -> None:
    """Adapters of rank 8 in slots of rank 32: the kernels work at 32."""
    law, scheduling = LinearStepLaw(), SchedulingLaw()
    law.token_breaks_ = []
    coefficients = {("launch", "1"): 5.0, ("launch", "GR"): 0.01, ("adapters", "R"): 0.02,
                    ("tokens", "1"): 0.1, ("adapters_tokens", "G"): 0.005}  # fmt: skip
    law.terms_ = [
        {"regime": 0, "feature": feature, "multiplier": multiplier, "ms": ms}
        for (feature, multiplier), ms in coefficients.items()
    ]
    scheduling.base_ms_, scheduling.per_running_ms_, scheduling.per_scanned_ms_ = 1.0, 0.25, 0.0
    workload = Workload(
        adapters=deal_adapters(6, [0.5], [8]),
        duration_s=60.0,
        lengths=Lengths(mean_input_tokens=100, mean_output_tokens=50),
    )
    engine = EngineConfig(model=LLAMA, max_loras=4, max_cpu_loras=6, max_lora_rank=32)
    run = simulate(workload, engine, replace(shipped, step_time=law, scheduling=scheduling))
    steps = run.steps[1:]
    took_ms = 1e3 * (steps.end_s - step_starts_s(run)[1:] - steps.load_s)
    by_hand = 5 + 0.01 * 4 * 32 + 0.02 * 32 * steps.adapters + 0.1 * steps.tokens
    by_hand += 0.005 * 4 * steps.adapters * steps.tokens + 1 + 0.25 * steps.running
    back_to_back = np.isclose(step_starts_s(run)[1:], run.steps.end_s[:-1], atol=0, rtol=0)
    assert back_to_back.mean() > 0.8
    assert took_ms[back_to_back] == pytest.approx(by_hand[back_to_back], rel=1e-4)
