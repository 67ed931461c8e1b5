"""A calibration fitted to a campaign recovers the laws that its tables were made by."""

import json
from itertools import product

import numpy as np
import pandas as pd
import pytest

from adapter_twin.calibrate.campaign_fit import (
    calibrate_campaign,
    median_steps,
    scheduling_times,
)
from adapter_twin.calibrate.from_tables import calibrate_tables, device_name
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import Calibration
from adapter_twin.laws.prior import known_constants
from adapter_twin.laws.roofline import RooflineLaw
from adapter_twin.service.metrics import summarize
from adapter_twin.service.predict import predict
from adapter_twin.service.validate import validate_runs
from adapter_twin.tables import datasets
from adapter_twin.twin.simulate import simulate_run
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.engine_versions import engine_version
from adapter_twin.workload.models import model_config, model_shape
from study import ch07_campaign

LAUNCH_MS, TOKEN_MS, ADAPTED_MS, ADAPTED_TOKEN_MS, PADDED_MS = 7.0, 0.5, 5.0, 0.25, 0.0625
OVERHEAD_MS = 11.0

SMALL = model_shape("small")
MACHINE = {"gpu": "cpu", "engine_version": "0.32.0", "memory_gib": 0.0, "source": {}}


def micro_steps() -> pd.DataFrame:
    """Decodes and prompts on four engines; a step in ten is disturbed."""
    rng = np.random.default_rng(0)
    engines = enumerate(product((2, 8), (8, 32)))
    levels = product((1, 4, 16, 32), (0, 64), (0, 1, 2), range(3))
    rows = []
    for (engine, (slots, padded)), (point, level) in product(engines, enumerate(levels)):
        decodes, prompt, adapters, repeat = level
        tokens, adapted = decodes + prompt, adapters > 0
        step_ms = LAUNCH_MS + TOKEN_MS * tokens
        step_ms += adapted * (ADAPTED_MS + (ADAPTED_TOKEN_MS + PADDED_MS * padded) * tokens)
        waiting = 64 if (adapters, prompt) == (2, 0) else 0
        schedule_ms = 0.2 + 0.02 * decodes + 0.004 * waiting
        disturbed = 5.0 if rng.random() < 0.1 else 1.0
        rows.append(
            {
                "engine_id": f"engine-{engine}",
                "model": "small",
                "adapter_slots": slots,
                "max_lora_rank": padded,
                "rank": 8 * adapted,
                "repeat": repeat,
                "point": point // 3,
                "step": repeat,
                "batched_tokens": tokens,
                "decodes": decodes,
                "prompts": int(prompt > 0),
                "prefill_tokens": prompt,
                "context_tokens": 100 * decodes + prompt,
                "distinct_adapters": adapters,
                "running": decodes + (prompt > 0),
                "waiting": waiting,
                "loads": 0,
                "step_ms": disturbed * (step_ms + schedule_ms),
                "schedule_ms": schedule_ms,
                "output_ms": 0.1,
            }
        )
    return pd.DataFrame(rows)


def adapter_loads() -> pd.DataFrame:
    rows = [
        {"rank": rank, "source": source, "load_ms": 1.0 if source == "memory" else 2 + rank / 8}
        for rank, source, _ in product((8, 32), ("memory", "disk"), range(5))
    ]
    fixed = {"engine_id": "engine-1", "model": "small", "max_lora_rank": 32}
    return pd.DataFrame(rows).assign(**fixed, index=range(len(rows)))


def engine_starts() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "engine_id": [f"engine-{i}" for i in range(4)],
            "model": "small",
            "adapter_slots": [2, 2, 8, 8],
            "max_lora_rank": [8, 32, 8, 32],
            "kv_cache_tokens": 131072.0,
            "block_size": 128.0,
            "weights_gib": 0.01,
            "startup_s": 5.0,
            "capture_s": float("nan"),
            "server_failure": None,
            "gpu_memory_utilization": 0.9,
            "cpu_kv_cache_gib": 0.25,
            "max_num_batched_tokens": 512,
            "max_num_seqs": 64,
            "max_model_len": 1024,
        }
    )


def runs() -> pd.DataFrame:
    """Six runs at two loads, two of them held out; what they measured is filled in later."""
    from adapter_twin.tables.campaign_schemas import CAMPAIGN_RUNS

    empty = dict.fromkeys(CAMPAIGN_RUNS.columns, float("nan"))
    rows = [
        {
            **empty,
            "run_id": f"campaign/run-{i}",
            "campaign": "campaign",
            "model": "small",
            "status": "ok",
            "rates_per_adapter": f"{rate}-{rate / 2}",
            "ranks": "8",
            "served_adapters": 8,
            "adapter_slots": slots,
            "max_lora_rank": 8,
            "max_num_seqs": 64,
            "duration_s": 60.0,
            "mean_input_tokens": 32.0,
            "mean_requested_output_tokens": 16.0,
            "max_num_batched_tokens": 512,
            "max_model_len": 1024,
            "length_distribution": "lognormal",
            "length_cv": 0.5,
            "block_size": 128.0,
            "seed": i,
            "repeat": 0,
            "held_out": i > 3,
            "sent_is_exact": True,
            "client_collapsed": False,
            "offered_request_rate": 6 * rate,
            "waiting_mean": 0.0,
            "source_path": f"serving.runs[{i}]",
        }
        for i, (rate, slots) in enumerate(product((0.125, 0.25, 0.5), (4, 8)))
    ]
    return pd.DataFrame(rows)


def measure(table: pd.DataFrame, calibration: Calibration) -> pd.DataFrame:
    """Fill in what the runs would measure if a calibration were the truth."""
    for place, row in enumerate(table.to_dict("records")):
        run = simulate_run(row, calibration)
        for name, value in summarize(run.records, run.gaps, run.duration_s).items():
            if name in table:
                table.loc[place, name] = value
        table.loc[place, "sent_requests"] = len(run.records)
    return table


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    made = {
        "micro_steps": micro_steps(),
        "adapter_loads": adapter_loads(),
        "engine_starts": engine_starts(),
        "runs": runs().assign(median_ttft_ms=100.0, completed_requests=9, sent_requests=9),
    }
    truth = calibrate_campaign(made, "small", SMALL, **MACHINE)
    truth.front_end.overhead_ms_, truth.front_end.overhead_per_running_ms_ = OVERHEAD_MS, 0.0
    return made | {"runs": measure(made["runs"], truth)}


@pytest.fixture(scope="module")
def fitted(tables: dict[str, pd.DataFrame]) -> Calibration:
    return calibrate_campaign(tables, "small", SMALL, **MACHINE)


def test_the_form_of_a_cpu_is_found_and_its_coefficients_recovered(fitted: Calibration) -> None:
    law = fitted.step_time
    assert law.form_.startswith("tokens x padded rank")
    coefficients = law.for_engine(4, 16)[0]
    launch, tokens, adapted, adapted_tokens = coefficients[[0, 1, 6, 7]]
    assert [launch, tokens, adapted] == pytest.approx([LAUNCH_MS, TOKEN_MS, ADAPTED_MS], rel=0.02)
    assert adapted_tokens == pytest.approx(ADAPTED_TOKEN_MS + 16 * PADDED_MS, rel=0.02)


def test_the_steps_of_a_gpu_are_fitted_by_the_law_of_gpus(tables: dict[str, pd.DataFrame]) -> None:
    on_gpu = calibrate_campaign(tables, "small", SMALL, **MACHINE | {"gpu": "some-gpu"})
    law = on_gpu.step_time
    assert isinstance(law, RooflineLaw)
    prior = known_constants("some-gpu", "0.32.0")
    moved = [abs(np.log(law.constants_[name] / value)) for name, (value, _) in prior.items()]
    assert max(moved) > 0.3  # nothing is known of it, so the measurements decide


def test_a_kv_cache_of_its_own_does_not_shrink_with_the_slots(fitted: Calibration) -> None:
    for slots, rank in ((2, 8), (512, 256)):
        engine = EngineConfig(model="small", max_loras=slots, max_lora_rank=rank)
        assert fitted.memory.kv_cache_tokens(engine) == 131072
    assert fitted.memory.max_model_len_ == 1024


def test_the_overhead_comes_from_runs_that_are_not_held_out(
    tables: dict[str, pd.DataFrame], fitted: Calibration
) -> None:
    assert fitted.front_end.overhead_ms_ == pytest.approx(OVERHEAD_MS, abs=0.5)
    told = tables["runs"].copy()
    told.loc[told.held_out, "median_ttft_ms"] = 1e6
    again = calibrate_campaign(
        tables | {"runs": told},
        "small",
        SMALL,
        **MACHINE,
    )
    assert again.front_end.overhead_ms_ == fitted.front_end.overhead_ms_


def test_a_calibration_of_a_campaign_survives_json(fitted: Calibration, tmp_path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(fitted.to_json())
    assert Calibration.from_json(path).to_json() == fitted.to_json()


def test_a_run_is_predicted_with_the_seed_of_its_load_generator(
    tables: dict[str, pd.DataFrame], fitted: Calibration
) -> None:
    row = tables["runs"].to_dict("records")[3]
    arrivals = [
        simulate_run({**row, "seed": seed}, fitted, seed=5).records.arrival_s for seed in (3, 4)
    ]
    assert np.array_equal(arrivals[0], simulate_run(row, fitted).records.arrival_s)
    assert not np.array_equal(arrivals[0], arrivals[1])


def test_held_out_runs_are_scored_apart_and_by_bars_of_their_own(
    tables: dict[str, pd.DataFrame], fitted: Calibration
) -> None:
    measured = tables["runs"]
    checked = validate_runs(measured, predict(measured, fitted, jobs=1))
    bars = checked.bars.set_index(["figure", "measure"])
    assert bars.loc[("median_ttft_ms", "mape"), "bar"] == 25
    assert bars.loc[("mean_itl_ms", "mape"), "n_runs"] == 2
    errors = ch07_campaign.service_errors(checked, measured).set_index("figure")
    assert errors.loc["mean_itl_ms", "held out"] < 2
    assert errors.loc["mean_itl_ms", "held-out runs"] == 2


def test_steps_that_load_an_adapter_are_no_observations_of_the_step_law() -> None:
    steps = micro_steps()
    with_load = pd.concat([steps, steps.assign(loads=1, step_ms=1e4)])
    assert median_steps(with_load).equals(median_steps(steps))


def test_requests_beside_a_prompt_wait_for_the_budget_and_are_not_scanned() -> None:
    batches = pd.DataFrame({"engine_id": "e", "prompts": [0, 2], "waiting": [64.0, 64.0]})
    assert scheduling_times(batches)["scanned"].tolist() == [64, 0]


def test_repeats_tell_how_far_the_same_traffic_scatters() -> None:
    twice = pd.concat([runs().iloc[:2]] * 2, ignore_index=True)
    for figure in ch07_campaign.FIGURES:
        twice[figure] = [90.0, 100.0, 110.0, 100.0]
    assert ch07_campaign.repeat_spread(twice).to_list() == pytest.approx([10.0] * 3)


def test_a_folder_of_a_campaign_is_known_and_its_machine_names_the_calibration(
    tables: dict[str, pd.DataFrame], tmp_path
) -> None:
    for name, table in tables.items():
        datasets.write_table(table, tmp_path / f"{name}.parquet")
    machine = {"device": "Some CPU", "gpus": [], "vllm": "0.32.0+cpu"}
    (tmp_path / "machine.json").write_text(json.dumps(machine))
    assert calibrate_tables(tmp_path).name == "small@cpu-vllm0.32.0"
    own = model_config("tiny") | {"hidden_size": 192, "num_hidden_layers": 3}
    (tmp_path / "machine.json").write_text(json.dumps(machine | {"model_config": own}))
    shape = calibrate_tables(tmp_path).memory.shape  # a model of one's own tells its shape
    assert (shape.hidden, shape.layers) == (192, 3)
    with pytest.raises(AdapterTwinError, match="model: 'large' is not in the tables"):
        calibrate_tables(tmp_path, "large")
    (tmp_path / "engine_starts.parquet").unlink()
    with pytest.raises(AdapterTwinError, match=r"engine_starts\.parquet is missing"):
        calibrate_tables(tmp_path)


def test_one_profiled_engine_cannot_tell_the_forms_apart(tables: dict[str, pd.DataFrame]) -> None:
    steps = tables["micro_steps"]
    one = tables | {"micro_steps": steps[steps["engine_id"] == steps["engine_id"].iloc[0]]}
    with pytest.raises(AdapterTwinError, match=r"micro_steps: of 1 engine; .* add one"):
        calibrate_campaign(one, "small", SMALL, **MACHINE)


def test_too_few_light_runs_are_refused_with_a_remedy(tables: dict[str, pd.DataFrame]) -> None:
    starved = tables["runs"].assign(waiting_mean=50.0)
    with pytest.raises(AdapterTwinError, match="add lightly loaded runs"):
        calibrate_campaign(
            tables | {"runs": starved},
            "small",
            SMALL,
            **MACHINE,
        )


def test_a_gpu_is_named_as_calibrations_name_it() -> None:
    machine = {"device": "NVIDIA H100 80GB HBM3", "gpus": [{}]}
    assert device_name(machine) == "h100-80gb-sxm"
    assert device_name(machine | {"device": "NVIDIA H20 96GB"}) == "h20-96gb"


@pytest.mark.parametrize(
    ("version", "reserves"),
    [("0.8.5", False), ("0.18.1", False), ("0.19.0", True), ("0.32.0+cpu", True), ("1.0", True)],
)
def test_engines_from_0_19_on_admit_a_prompt_only_whole(version: str, reserves: bool) -> None:
    assert engine_version(version).reserves_prompts is reserves
