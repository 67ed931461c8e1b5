"""What public reports on multi-LoRA serving ask, and the right answers."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from adapter_twin.errors import AdapterTwinError
from adapter_twin.plan.demand import Demand
from adapter_twin.service.predict import predict_scenario
from adapter_twin.twin.records import Simulation
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.strict import read

LLAMA = "llama-3.1-8b-instruct"
LENGTHS = {"mean_input_tokens": 223, "mean_output_tokens": 198}
DEALT = {"count": 96, "request_rates": [0.1, 0.05, 0.025], "ranks": [8, 16]}
ENGINE = {"model": LLAMA, "max_loras": 32, "max_cpu_loras": 96, "max_lora_rank": 16}

Answer = tuple[Simulation, dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    def ask(
        engine: dict[str, Any],
        requests: str | None = None,
        adapters: Any = DEALT,
        duration_s: float = 600.0,
        vllm_args: str | None = None,
        **workload: Any,
    ) -> Answer:
        content = {
            "engine": engine,
            "workload": {"adapters": adapters, "duration_s": duration_s, "lengths": LENGTHS}
            | workload,
        }
        if requests is not None:
            header = "arrival_s,adapter,prompt_tokens,output_tokens\n"
            (tmp_path / "trace.csv").write_text(header + requests)
            content["workload"]["arrivals"] = {"process": "trace", "path": "trace.csv"}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return predict_scenario(load_scenario(tmp_path / "config.yaml", vllm_args))

    return ask


def test_a_hugging_face_name_is_as_good_as_ours(ask: Any) -> None:
    _, named = ask(ENGINE | {"model": "meta-llama/Llama-3.1-8B-Instruct"})
    assert named["kv_cache_tokens"] == 284_064


def test_a_host_cache_as_large_as_the_slots_reads_in_chains(ask: Any) -> None:
    _, enough = ask(ENGINE)
    _, short = ask({name: ENGINE[name] for name in ("model", "max_loras", "max_lora_rank")})
    assert short["median_ttft_ms"] > 50 * enough["median_ttft_ms"]


def test_a_small_host_cache_is_named_as_the_cause(tmp_path: Path) -> None:
    content = {
        "engine": ENGINE | {"max_cpu_loras": 32},
        "workload": {"adapters": DEALT, "duration_s": 10, "lengths": LENGTHS},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match=r"max_cpu_loras: 32 of the 96 .* in chains .* to 96"):
        predict_scenario(load_scenario(tmp_path / "config.yaml"))


def test_later_requests_of_the_loaded_adapter_overtake(ask: Any) -> None:
    adapters = [{"name": name, "rank": 8, "request_rate": 0} for name in "ab"]
    rows = "0,0,100,300\n1,1,100,50\n2,0,100,50\n4,0,100,50\n"
    run, _ = ask(ENGINE | {"max_loras": 1}, rows, adapters, 60.0)
    assert run.records.scheduled_s[1] > run.records.scheduled_s[2:].max()


def test_an_adapter_that_never_runs_shows_in_the_summary(ask: Any) -> None:
    adapters = [{"name": name, "rank": 8, "request_rate": 0} for name in ("steady", "lone")]
    steady = "".join(f"{0.5 * k},0,100,200\n" for k in range(200))
    _, told = ask(ENGINE | {"max_loras": 1}, steady + "5.2,1,100,20\n", adapters, 100.0)
    assert told["worst_adapter"] == "lone"
    assert told["worst_adapter_mean_ttft_ms"] > 50_000


def test_the_base_model_needs_no_slot(ask: Any) -> None:
    adapters = [{"name": name, "rank": 8, "request_rate": 0} for name in "ab"]
    rows = "0,0,100,300\n0.5,1,100,50\n0.6,-1,100,50\n"
    run, _ = ask(ENGINE | {"max_loras": 1}, rows, adapters, 60.0)
    _, b, base = run.records.scheduled_s
    assert base < 1 < 4 < b


def test_lora_costs_what_the_engine_without_it_saves(ask: Any) -> None:
    idle = [{"name": "a", "rank": 8, "request_rate": 0}]
    flags = {"model": LLAMA, "max_cpu_loras": 1, "max_lora_rank": 8, "max_num_seqs": 256}
    _, without = ask(flags | {"max_loras": 0}, None, idle, 300.0, base_model_request_rate=20)
    _, one = ask(flags | {"max_loras": 1}, None, idle, 300.0, base_model_request_rate=20)
    assert without["kv_cache_tokens"] == pytest.approx(334_816, rel=1e-3)  # as was measured
    assert without["mean_itl_ms"] < 0.9 * one["mean_itl_ms"]
    with pytest.raises(AdapterTwinError, match="0 slots serve the base model alone"):
        ask(flags | {"max_loras": 0})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: .* adapter-twin memory"),
        ({"quantization": "awq"}, "engine.quantization: unknown key"),
        ({"enforce_eager": True}, "engine.enforce_eager: unknown key"),
        ({"lora_extra_vocab_size": 512}, "engine.lora_extra_vocab_size: unknown key"),
        ({"lora_target_modules": ["o_proj"]}, "lora_target_modules: vLLM 0.8.5 has no such flag"),
        ({"specialize_active_lora": True}, "specialize_active_lora: vLLM 0.8.5 has no such"),
    ],
)
def test_a_flag_that_cannot_be_answered_is_refused(
    ask: Any, flag: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=message) as caught:
        ask(ENGINE | flag)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flag",
    [
        {"kv_cache_dtype": "fp8"},
        {"fully_sharded_loras": True},
        {"enable_prefix_caching": True},
        {"long_prefill_token_threshold": 512},
    ],
)
def test_a_flag_that_people_set_is_answered(ask: Any, flag: dict[str, Any]) -> None:
    assert ask(ENGINE | flag, duration_s=20.0)[1]["completed_requests"] > 0


def test_adapters_named_at_the_start_are_not_read_at_their_first_request(ask: Any) -> None:
    engine = ENGINE | {"max_loras": 64, "max_cpu_loras": 384, "max_lora_rank": 32}
    dealt = {"count": 384, "request_rates": [0.01], "ranks": [32]}
    runs = {
        named: ask(engine | {"lora_modules": named}, None, dealt, 120.0)
        for named in ("none", "all")
    }
    waits_s = {named: run.records.load_wait_s for named, (run, _) in runs.items()}
    assert (waits_s["none"] > 0.05).sum() > 200
    assert (waits_s["all"] > 0.05).sum() == 0  # copies only
    startup_s = {named: told["startup_s"] for named, (_, told) in runs.items()}
    assert startup_s["all"] - startup_s["none"] > 33


def test_an_adapter_of_fewer_modules_is_copied_and_read_faster(ask: Any) -> None:
    dealt = [{"name": f"a{k}", "rank": 16, "request_rate": 0.2} for k in range(16)]
    few = [adapter | {"target_modules": ["q_proj", "v_proj"]} for adapter in dealt]
    engine = ENGINE | {"max_loras": 4}
    all_s, few_s = (ask(engine, None, one, 60.0)[0].records.load_wait_s for one in (dealt, few))
    assert few_s.max() < 0.7 * all_s.max()
    with pytest.raises(AdapterTwinError, match=r"a0.target_modules: no module 'qproj'; did you"):
        ask(engine, None, [dealt[0] | {"target_modules": ["qproj"]}])


def test_vllms_own_defaults_are_told_from_the_studys(ask: Any) -> None:
    under_load = {"count": 96, "request_rates": [0.16], "ranks": [8, 16]}
    run, _ = ask(ENGINE | {"defaults": "vllm"}, None, under_load, 20.0)
    assert (run.engine.max_num_seqs, run.engine.max_num_batched_tokens) == (256, 2048)
    with pytest.raises(AdapterTwinError, match=r"engine.defaults: got 'vlm'; did you mean 'vllm'"):
        ask(ENGINE | {"defaults": "vlm"})


def test_a_request_longer_than_the_context_is_refused_and_never_scheduled(ask: Any) -> None:
    rows = "0,0,100,50\n1,0,9000,50\n2,0,8192,1\n3,0,8100,92\n"
    adapters = [{"name": "a", "rank": 8, "request_rate": 0}]
    run, told = ask(ENGINE | {"max_model_len": 8192}, rows, adapters, 60.0)
    assert np.isnan(run.records.scheduled_s).tolist() == [False, True, True, False]
    assert (told["arrived_requests"], told["dropped_requests"]) == (4, 2)
    assert told["completed_requests"] == 2
    assert told["p99_ttft_ms"] < 5000


def test_a_real_command_line_is_simulated_as_it_is(ask: Any) -> None:
    flags = "--enable-lora --max-loras 32 --max-cpu-loras 96 --max-model-len 8192 --port 80"
    run, told = ask({}, None, DEALT, 20.0, f"vllm serve meta-llama/Llama-3.1-8B-Instruct {flags}")
    assert (run.engine.max_num_seqs, run.engine.max_model_len) == (256, 8192)
    assert told["kv_cache_tokens"] > 284_064  # a smaller batch holds less


def test_slots_of_rank_1_are_as_narrow_where_the_version_takes_them() -> None:
    adapters = ({"name": "a", "rank": 1, "request_rate": 1.0},)
    asked = {"adapters": adapters, "lengths": {**LENGTHS, "distribution": "lognormal"}}
    assert read(Demand, {"model": "small", **asked}).max_lora_rank == 1
    assert read(Demand, {"model": LLAMA, **asked}).max_lora_rank == 8
