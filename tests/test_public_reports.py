"""What public reports on multi-LoRA serving ask, and the right answers.

Each test is of a kind of question; its docstring names the reports, issues of vLLM where no other
project is told. Other kinds have their tests with the laws of memory, logs of requests, benchmark
results, printed commands, and the conformance to vLLM's scheduler.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from adapter_twin import load_calibration
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws.memory import MemoryLaw
from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.plan.recommend import recommend
from adapter_twin.service.predict import predict_scenario
from adapter_twin.twin.records import Simulation
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.models import model_shape
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
        given = {name: value for name, value in content["workload"].items() if value is not None}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content | {"workload": given}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return predict_scenario(load_scenario(tmp_path / "config.yaml", vllm_args))

    return ask


def test_a_hugging_face_name_is_as_good_as_ours(ask: Any) -> None:
    """Models are asked for by their names on Hugging Face (#10062, #15039)."""
    _, named = ask(ENGINE | {"model": "meta-llama/Llama-3.1-8B-Instruct"})
    assert named["kv_cache_tokens"] == 284_064


def test_a_host_cache_as_large_as_the_slots_reads_in_chains(ask: Any) -> None:
    """Left out, max_cpu_loras is max_loras (#20873; llm-d-inference-sim #76): changes read."""
    _, enough = ask(ENGINE)
    _, short = ask({name: ENGINE[name] for name in ("model", "max_loras", "max_lora_rank")})
    assert short["median_ttft_ms"] > 50 * enough["median_ttft_ms"]


def test_a_small_host_cache_is_named_as_the_cause(tmp_path: Path) -> None:
    """Nothing told of the reads until somebody looked for them (#20873)."""
    content = {
        "engine": ENGINE | {"max_cpu_loras": 32},
        "workload": {"adapters": DEALT, "duration_s": 10, "lengths": LENGTHS},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match=r"max_cpu_loras: 32 of the 96 .* in chains .* to 96"):
        predict_scenario(load_scenario(tmp_path / "config.yaml"))


def test_later_requests_of_the_loaded_adapter_overtake(ask: Any) -> None:
    """With one slot an earlier request of another adapter waits (#16876, #15422)."""
    adapters = [{"name": name, "rank": 8, "request_rate": 0} for name in "ab"]
    rows = "0,0,100,300\n1,1,100,50\n2,0,100,50\n4,0,100,50\n"
    run, _ = ask(ENGINE | {"max_loras": 1}, rows, adapters, 60.0)
    assert run.records.scheduled_s[1] > run.records.scheduled_s[2:].max()


def test_an_adapter_that_never_runs_shows_in_the_summary(ask: Any) -> None:
    """A steady adapter keeps the slot for ever (#9289; sglang #15129)."""
    adapters = [{"name": name, "rank": 8, "request_rate": 0} for name in ("steady", "lone")]
    steady = "".join(f"{0.5 * k},0,100,200\n" for k in range(200))
    _, told = ask(ENGINE | {"max_loras": 1}, steady + "5.2,1,100,20\n", adapters, 100.0)
    assert told["worst_adapter"] == "lone"
    assert told["worst_adapter_mean_ttft_ms"] > 50_000


def test_the_base_model_needs_no_slot(ask: Any) -> None:
    """Requests to the base model pass where slots are full (#15422; sglang #23141)."""
    adapters = [{"name": name, "rank": 8, "request_rate": 0} for name in "ab"]
    rows = "0,0,100,300\n0.5,1,100,50\n0.6,-1,100,50\n"
    run, _ = ask(ENGINE | {"max_loras": 1}, rows, adapters, 60.0)
    _, b, base = run.records.scheduled_s
    assert base < 1 < 4 < b


def test_lora_costs_what_the_engine_without_it_saves(ask: Any) -> None:
    """Slower as soon as LoRA is enabled (#10062, #11267, #9143; lorax #333, #670)."""
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
    """Quantised and shared models are served too (#13204, #23301, #20873; lorax #323)."""
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
    """Flags of production commands (#34984, #3958; llm-d-planner #35)."""
    assert ask(ENGINE | flag, duration_s=20.0)[1]["completed_requests"] > 0


def test_adapters_named_at_the_start_are_not_read_at_their_first_request(ask: Any) -> None:
    """Those of --lora-modules are loaded before the server is ready (0.8.5's serving_models.py)."""
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
    """Many adapters change some of the modules only (#34984)."""
    dealt = [{"name": f"a{k}", "rank": 16, "request_rate": 0.2} for k in range(16)]
    few = [adapter | {"target_modules": ["q_proj", "v_proj"]} for adapter in dealt]
    engine = ENGINE | {"max_loras": 4}
    all_s, few_s = (ask(engine, None, one, 60.0)[0].records.load_wait_s for one in (dealt, few))
    assert few_s.max() < 0.7 * all_s.max()
    with pytest.raises(AdapterTwinError, match=r"a0.target_modules: no module 'qproj'; did you"):
        ask(engine, None, [dealt[0] | {"target_modules": ["qproj"]}])


def test_vllms_own_defaults_are_told_from_the_studys(ask: Any) -> None:
    """vLLM takes 256 and 2048, or 1024 and 8192 on larger GPUs (its arg_utils.py)."""
    under_load = {"count": 96, "request_rates": [0.16], "ranks": [8, 16]}
    run, _ = ask(ENGINE | {"defaults": "vllm"}, None, under_load, 20.0)
    assert (run.engine.max_num_seqs, run.engine.max_num_batched_tokens) == (256, 2048)
    with pytest.raises(AdapterTwinError, match=r"engine.defaults: got 'vlm'; did you mean 'vllm'"):
        ask(ENGINE | {"defaults": "vlm"})


def test_a_request_longer_than_the_context_is_refused_and_never_scheduled(ask: Any) -> None:
    """Many lower max_model_len to start at all (#2418; Qwen3 #295; LlamaFactory #6472)."""
    rows = "0,0,100,50\n1,0,9000,50\n2,0,8192,1\n3,0,8100,92\n"
    adapters = [{"name": "a", "rank": 8, "request_rate": 0}]
    run, told = ask(ENGINE | {"max_model_len": 8192}, rows, adapters, 60.0)
    assert np.isnan(run.records.scheduled_s).tolist() == [False, True, True, False]
    assert (told["arrived_requests"], told["dropped_requests"]) == (4, 2)
    assert told["completed_requests"] == 2
    assert told["p99_ttft_ms"] < 5000


def test_a_real_command_line_is_simulated_as_it_is(ask: Any) -> None:
    """People report the command that they run (#16716, #29049)."""
    flags = "--enable-lora --max-loras 32 --max-cpu-loras 96 --max-model-len 8192 --port 80"
    run, told = ask({}, None, DEALT, 20.0, f"vllm serve meta-llama/Llama-3.1-8B-Instruct {flags}")
    assert (run.engine.max_num_seqs, run.engine.max_model_len) == (256, 8192)
    assert told["kv_cache_tokens"] > 284_064  # a smaller batch holds less


def test_slots_of_rank_1_are_as_narrow_where_the_version_takes_them() -> None:
    """Slots may have rank 1 since #26461."""
    adapters = ({"name": "a", "rank": 1, "request_rate": 1.0},)
    asked = {"adapters": adapters, "lengths": {**LENGTHS, "distribution": "lognormal"}}
    assert read(Demand, {"model": "small", **asked}).max_lora_rank == 1
    assert read(Demand, {"model": LLAMA, **asked}).max_lora_rank == 8


@pytest.mark.parametrize(("slots", "reported_s"), [(4, 65), (32, 143)])
def test_graphs_of_0_8_are_captured_the_longer_the_more_slots(slots: int, reported_s: int) -> None:
    """#16716 (0.8.3, Llama-2-7B); dphnAI/sonar #1454 before its change; both on other GPUs."""
    engine = EngineConfig(model=LLAMA, max_loras=slots, max_lora_rank=8)
    startup_s = load_calibration("auto", LLAMA).memory.startup_s(engine)
    assert startup_s == pytest.approx(reported_s, rel=0.15)


@pytest.mark.parametrize("version", ["0.19.0", "0.32.0"])
def test_later_graphs_are_captured_in_seconds_with_any_slots(version: str) -> None:
    """#23777: 15 s with 32 slots of Llama-3-70B on 4 GPUs; dphnAI/sonar #1454: 11 s."""
    law = MemoryLaw(model_shape(LLAMA), version, 79.1)
    few_s, many_s = (law.startup_s(EngineConfig(model=LLAMA, max_loras=n)) for n in (4, 32))
    assert few_s == many_s == pytest.approx(13, abs=2)


@pytest.mark.parametrize("listed", [True, False])
def test_a_replay_is_judged_by_what_its_trace_holds(ask: Any, listed: bool) -> None:
    """Replays tell overloads (inference-sim #1270, #1692; Mooncake #1266), without rates."""
    dealt = {"count": 4, "ranks": [16]}
    adapters = [{"name": name, "rank": 16} for name in "abcd"] if listed else dealt
    engine = ENGINE | {"max_loras": 4, "max_cpu_loras": 4}
    for requests, starved in ((1000, True), (10, False)):
        rows = "".join(f"{k / 50},{k % 4},900,500\n" for k in range(requests))
        _, told = ask(engine, rows, adapters, 20.0, lengths=None)
        assert told["offered_tokens_per_s"] == pytest.approx(requests * (900 + 500) / 20)
        assert told["starved"] is starved


def test_more_slots_than_host_memory_holds_are_refused(ask: Any) -> None:
    """As vLLM does (aibrix #1831); max_cpu_loras is not the number of adapters served."""
    with pytest.raises(AdapterTwinError, match=r"exceed max_cpu_loras = 16, the adapters kept in "):
        ask(ENGINE | {"max_cpu_loras": 16})


@pytest.mark.parametrize(
    ("rank", "slots"),
    [(4, 8), (12, 16), (48, 64), (256, 256), (300, 320), (400, 512), (600, None)],
)
def test_odd_ranks_get_slots_of_the_next_size(rank: int, slots: int | None) -> None:
    """Adapters may have ranks that max_lora_rank does not take (#10623; prime-rl #1408)."""
    adapters = tuple({"name": f"a{r}", "rank": r, "request_rate": 0.1} for r in (1, rank))
    asked = {"model": LLAMA, "adapters": adapters, "lengths": LENGTHS}
    if slots is None:
        with pytest.raises(AdapterTwinError, match="600 is above 512, the most that vLLM takes"):
            read(Demand, asked)
    else:
        assert read(Demand, asked).max_lora_rank == slots


@pytest.mark.parametrize("model", ["llama-3.2-1b", "mistralai/Mistral-7B-Instruct-v0.3"])
def test_models_that_cannot_be_simulated_are_not_offered(ask: Any, model: str) -> None:
    """Many models are asked for (#17003, #9496; lorax #333); memory is told of all."""
    with pytest.raises(AdapterTwinError, match=f"there are {LLAMA}.*; adapter-twin memory") as told:
        ask(ENGINE | {"model": model})
    assert "tiny" not in str(told.value)


def test_an_azure_trace_is_replayed_and_planned_for(ask: Any, tmp_path: Path) -> None:
    """The Azure LLM inference traces of 2023 and 2024 hold dates and no adapters."""
    rows = ("03.9799600,4808,10", "04.0319600,3180,8", "04.0781490,110,27", "04.1226890,1180,18")
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"2023-11-16 18:17:{r}" for r in rows)]
    (tmp_path / "azure.csv").write_text("\n".join(lines))
    arrivals = {"process": "trace", "path": "azure.csv"}
    dealt = {"count": 4, "ranks": [16]}
    run, told = ask(ENGINE, adapters=dealt, arrivals=arrivals, lengths=None)
    assert run.records.arrival_s.tolist() == pytest.approx([0, 0.052, 0.098189, 0.142729])
    assert told["completed_requests"] == 4
    adapters = [{"name": "a", "rank": 8}, {"name": "b", "rank": 16}]
    asked = {"model": LLAMA, "adapters": adapters, "request_log": "azure.csv"}
    (tmp_path / "demand.yaml").write_text(yaml.safe_dump(asked))
    with (
        pytest.warns(UserWarning, match="names no adapters"),
        pytest.raises(AdapterTwinError, match=r"one GPU cannot serve them; .*; lower the rates or"),
    ):
        recommend(load_demand(tmp_path / "demand.yaml"))


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_one_log_is_planned_for_and_replayed(tmp_path: Path) -> None:
    """Names of adapters are read by both; so short a log tells no interval, and no warning."""
    rows = "support,0.1,310,120\nlegal,0.5,1200,300\n"
    (tmp_path / "log.csv").write_text(f"adapter,arrival_s,prompt_tokens,output_tokens\n{rows}")
    adapters = [{"name": "support", "rank": 8}, {"name": "legal", "rank": 16}]
    planned = {"model": LLAMA, "adapters": adapters, "request_log": "log.csv"}
    (tmp_path / "demand.yaml").write_text(yaml.safe_dump(planned))
    replayed = {
        "engine": ENGINE | {"max_loras": 2, "max_cpu_loras": 2},
        "workload": {
            "adapters": adapters,
            "duration_s": 60,
            "arrivals": {"process": "trace", "path": "log.csv"},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(replayed))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        answer = recommend(load_demand(tmp_path / "demand.yaml"))
    assert answer["worst_served"]["name"] == "legal"
    assert np.isnan(answer["expected"]["mean_ttft_ms"]["low"])
    run, _ = predict_scenario(load_scenario(tmp_path / "config.yaml"))
    assert run.records.adapter.tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:.*is an extrapolation")
def test_answers_of_one_token_have_no_times_between_tokens(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Guardrails: thousands of adapters whose answers are one token (plurai.ai's blog)."""
    content = {
        "engine": ENGINE | {"max_loras": 16, "max_cpu_loras": 64},
        "workload": {
            "adapters": {"count": 64, "request_rates": [0.1], "ranks": [16]},
            "duration_s": 20,
            "lengths": {
                "distribution": "fixed",
                "mean_input_tokens": 1500,
                "mean_output_tokens": 1,
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    status, out, _ = run("simulate", "config.yaml", "--json")
    told = json.loads(out, parse_constant=pytest.fail)  # NaN is no JSON
    assert status == 0
    assert told["completed_requests"] > 50
    assert (told["mean_itl_ms"], told["mean_tpot_ms"]) == (None, None)
