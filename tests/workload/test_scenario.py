"""Configurations: what is accepted, what is refused, and in which words."""

from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapter_twin.errors import AdapterTwinError
from adapter_twin.workload.adapters import Adapter, deal_adapters, zipf_adapters
from adapter_twin.workload.engine_config import LORA_RANKS, EngineConfig
from adapter_twin.workload.files import (
    DEFAULT_DURATION_S,
    DEFAULT_MEAN_INPUT_TOKENS,
    DEFAULT_MEAN_OUTPUT_TOKENS,
    load_scenario,
    parse_ranks,
    parse_rates,
    run_to_workload,
)
from adapter_twin.workload.scenario import Scenario, Slo, config_hash
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload

ENGINE = EngineConfig(
    model="llama-3.1-8b-instruct", max_loras=32, max_cpu_loras=96, max_lora_rank=16
)
LENGTHS = Lengths(mean_input_tokens=223, mean_output_tokens=198)
WORKLOAD = Workload(
    adapters=deal_adapters(96, [0.1, 0.05], [8, 16]), duration_s=60, lengths=LENGTHS
)

YAML = """
engine: {model: llama-3.1-8b-instruct, max_loras: 32, max_cpu_loras: 96, max_lora_rank: 16}
workload:
  duration_s: 3600
  adapters: {count: 96, request_rates: [0.1, 0.05, 0.025], ranks: [8, 16, 16]}
  lengths: {distribution: sharegpt, mean_input_tokens: 223, mean_output_tokens: 198}
"""

RUN = {
    "run_id": "r1",
    "model": "qwen-2.5-7b-instruct",
    "rates_per_adapter": "0.1-0.05-0.025",
    "ranks": "8-16",
    "served_adapters": 128,
    "adapter_slots": 64,
    "max_lora_rank": 16,
    "max_num_seqs": 2048,
    "duration_s": 3600.06,
    "mean_input_tokens": 222.7,
    "mean_requested_output_tokens": 196.1,
}


@pytest.fixture
def config_file(tmp_path):
    """Write a scenario file after replacing one piece of the valid one; return its path."""

    def write(old="", new=""):
        assert old in YAML
        path = tmp_path / "config.yaml"
        path.write_text(YAML.replace(old, new, 1) if old else YAML + new)
        return path

    return write


def refused(action, *words):
    """Check that `action` raises one line that holds all the words."""
    with pytest.raises(AdapterTwinError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# ---------------------------------------------------------------- engine


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_loras": 97}, ("max_loras", "97", "max_cpu_loras", "96")),
        ({"max_loras": -1}, ("max_loras", "at least 0")),
        ({"max_lora_rank": 24}, ("max_lora_rank", "24", "32")),
        ({"max_num_seqs": 4096}, ("max_num_batched_tokens", "max_num_seqs")),
        ({"gpu_memory_utilization": 1.1}, ("gpu_memory_utilization",)),
        ({"gpu_memory_utilization": float("nan")}, ("gpu_memory_utilization",)),
        ({"block_size": -16}, ("block_size",)),
        ({"model": ""}, ("model",)),
    ],
)
def test_engine_refuses_what_vllm_refuses(change, words):
    refused(lambda: replace(ENGINE, **change), *words)


def test_as_many_slots_as_served_adapters_are_allowed():
    assert replace(ENGINE, max_loras=96).max_loras == 96


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_loras": True}, ("max_loras", "whole number", "True")),
        ({"max_loras": 32.0}, ("max_loras", "whole number", "32.0")),
        ({"max_loras": "32"}, ("max_loras", "whole number", "'32'")),
        ({"gpu_memory_utilization": "0.9"}, ("gpu_memory_utilization", "not in quotes")),
        ({"gpu_memory_utilization": True}, ("gpu_memory_utilization", "number", "True")),
        ({"max_lorras": 32}, ("max_lorras: unknown key", "'max_loras'")),
    ],
)
def test_python_is_refused_what_a_file_is_refused(change, words):
    refused(lambda: EngineConfig(**(asdict(ENGINE) | change)), *words)


def test_numbers_of_a_table_become_pythons_own():
    engine = replace(ENGINE, max_loras=np.int64(8), gpu_memory_utilization=np.float32(0.5))
    assert (type(engine.max_loras), type(engine.gpu_memory_utilization)) == (int, float)
    assert config_hash(engine) == config_hash(
        replace(ENGINE, max_loras=8, gpu_memory_utilization=0.5)
    )


def test_a_number_of_requests_is_the_same_whole_or_not():
    assert config_hash(replace(WORKLOAD, duration_s=60)) == config_hash(
        replace(WORKLOAD, duration_s=60.0)
    )


# ---------------------------------------------------------------- traffic


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_request_rates_are_finite_and_not_negative(rate):
    refused(lambda: Adapter(name="a", rank=8, request_rate=rate), "request_rate")
    refused(lambda: replace(WORKLOAD, base_model_request_rate=rate), "base_model_request_rate")


def test_an_idle_adapter_is_allowed():
    assert Adapter(name="a", rank=8, request_rate=0).request_rate == 0


def test_two_adapters_may_not_share_a_name():
    twins = (WORKLOAD.adapters[0], WORKLOAD.adapters[0])
    refused(lambda: replace(WORKLOAD, adapters=twins), "adapters", "adapter-0")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Arrivals(process="gama"), ("process", "did you mean 'gamma'")),
        (lambda: Arrivals(process="gamma", cv=0), ("cv",)),
        (lambda: Arrivals(process="poisson", cv=2), ("cv", "gamma")),
        (lambda: Arrivals(process="trace"), ("path",)),
        (lambda: Arrivals(path="trace.csv"), ("path", "trace")),
        (lambda: replace(LENGTHS, distribution="normal"), ("distribution", "lognormal")),
        (lambda: replace(LENGTHS, mean_input_tokens=0.5), ("mean_input_tokens",)),
        (lambda: replace(LENGTHS, mean_output_tokens=float("inf")), ("mean_output_tokens",)),
        (lambda: replace(LENGTHS, cv=2), ("cv", "lognormal")),
        (lambda: replace(LENGTHS, rank_correlation=-1.1), ("rank_correlation",)),
        (
            lambda: Lengths(distribution="fixed", mean_input_tokens=2.5, mean_output_tokens=1),
            ("mean_input_tokens", "whole"),
        ),
        (
            lambda: replace(LENGTHS, distribution="fixed", rank_correlation=0.1),
            ("rank_correlation",),
        ),
        (lambda: replace(WORKLOAD, duration_s=0), ("duration_s",)),
        (lambda: Slo(), ("ttft_ms",)),
        (lambda: Slo(ttft_ms=-1), ("ttft_ms",)),
        (lambda: Slo(itl_ms=50, percentile=100), ("percentile",)),
        (lambda: Slo(itl_ms=50, percentile=0.99), ("percentile", "99, not 0.99")),
    ],
)
def test_impossible_traffic_is_refused_by_field(build, words):
    refused(build, *words)


def test_offered_load_counts_adapters_and_base_model():
    workload = Workload(
        adapters=deal_adapters(4, [0.5, 0.25], [8]),
        duration_s=10,
        lengths=Lengths(mean_input_tokens=100, mean_output_tokens=50),
        base_model_request_rate=0.5,
    )
    assert workload.offered_request_rate == pytest.approx(2.0)
    assert workload.offered_tokens_per_s == pytest.approx(300.0)


def test_an_adapter_above_the_slots_rank_is_refused():
    big = replace(WORKLOAD, adapters=(Adapter(name="big", rank=32, request_rate=1),))
    refused(lambda: Scenario(engine=ENGINE, workload=big), "max_lora_rank", "big", "32")


# ---------------------------------------------------------------- dealing


def test_rates_are_dealt_as_the_reference_study_dealt_them():
    adapters = deal_adapters(128, [0.1, 0.05, 0.025], [8, 16])
    assert Counter(a.request_rate for a in adapters) == {0.1: 43, 0.05: 43, 0.025: 42}
    assert sum(a.request_rate for a in adapters) == pytest.approx(7.5)
    assert [a.rank for a in adapters[:4]] == [8, 16, 8, 16]


@given(
    count=st.integers(1, 60),
    rates=st.lists(st.floats(0, 10), min_size=1, max_size=4),
    ranks=st.lists(st.sampled_from(LORA_RANKS), min_size=1, max_size=4),
)
def test_dealing_is_round_robin(count, rates, ranks):
    adapters = deal_adapters(count, rates, ranks)
    assert len({a.name for a in adapters}) == count
    for i, adapter in enumerate(adapters):
        assert adapter.request_rate == rates[i % len(rates)]
        assert adapter.rank == ranks[i % len(ranks)]


@given(count=st.integers(1, 200), total=st.floats(0.01, 1e3), exponent=st.floats(0, 3))
def test_zipf_shares_follow_the_power_law_and_sum_to_the_total(count, total, exponent):
    rates = [a.request_rate for a in zipf_adapters(count, total, exponent, [8])]
    assert sum(rates) == pytest.approx(total)
    for k, rate in enumerate(rates, start=1):
        assert rate == pytest.approx(rates[0] * k**-exponent)


@pytest.mark.parametrize(
    ("deal", "word"),
    [
        (lambda: deal_adapters(0, [1], [8]), "count"),
        (lambda: deal_adapters(1, [], [8]), "request_rates"),
        (lambda: deal_adapters(1, [1], []), "ranks"),
        (lambda: zipf_adapters(0, 1, 1, [8]), "count"),
        (lambda: zipf_adapters(1, -1, 1, [8]), "total_request_rate"),
        (lambda: zipf_adapters(1, 1, -1, [8]), "zipf_exponent"),
    ],
)
def test_dealing_refuses_nothing_to_deal(deal, word):
    refused(deal, word)


# ---------------------------------------------------------------- YAML


def test_a_short_file_reads_as_the_same_configuration_built_by_hand(config_file):
    scenario = load_scenario(config_file())
    assert scenario == Scenario(
        engine=ENGINE,
        workload=Workload(
            adapters=deal_adapters(96, [0.1, 0.05, 0.025], [8, 16, 16]),
            duration_s=3600,
            lengths=LENGTHS,
        ),
    )


def test_zipf_popularity_is_read_from_its_short_form(config_file):
    path = config_file(
        "request_rates: [0.1, 0.05, 0.025]", "total_request_rate: 5, zipf_exponent: 1"
    )
    assert load_scenario(path).workload.adapters == zipf_adapters(96, 5, 1, [8, 16, 16])


def test_a_relative_trace_is_looked_for_beside_the_file(config_file, tmp_path):
    path = config_file("  lengths:", "  arrivals: {process: trace, path: t.csv}\n  lengths:")
    assert load_scenario(path).workload.arrivals.path == str(tmp_path / "t.csv")


scenarios = st.builds(
    Scenario,
    engine=st.builds(
        EngineConfig,
        model=st.sampled_from(["a", "llama-3.1-8b-instruct"]),
        max_loras=st.integers(1, 8),
        max_cpu_loras=st.integers(8, 64),
        max_lora_rank=st.sampled_from(LORA_RANKS[1:]),
        max_num_seqs=st.integers(1, 2048),
        gpu_memory_utilization=st.floats(0.1, 1),
    ),
    workload=st.builds(
        Workload,
        adapters=st.lists(
            st.builds(
                Adapter,
                name=st.from_regex(r"[a-z][a-z0-9_.-]*", fullmatch=True),
                rank=st.just(8),
                request_rate=st.floats(0, 9),
            ),
            unique_by=lambda a: a.name,
            max_size=4,
        ).map(tuple),
        duration_s=st.floats(0.1, 1e5),
        lengths=st.builds(
            Lengths,
            distribution=st.just("lognormal"),
            mean_input_tokens=st.floats(1, 1e4),
            mean_output_tokens=st.floats(1, 1e4),
            cv=st.floats(0.1, 5),
            rank_correlation=st.floats(-1, 1),
        ),
        arrivals=st.builds(Arrivals, process=st.just("gamma"), cv=st.floats(0.1, 5)),
        base_model_request_rate=st.floats(0, 9),
    ),
    calibration=st.sampled_from(["auto", "b"]),
    seed=st.integers(0, 2**63 - 1),
    observer=st.booleans(),
    slo=st.none() | st.builds(Slo, ttft_ms=st.floats(1, 1e4), percentile=st.floats(2, 99)),
)


def as_yaml(scenario):
    content = asdict(scenario)
    content["workload"]["adapters"] = list(content["workload"]["adapters"])
    content["engine"]["policy"] = content.pop("policy")
    return yaml.safe_dump(content)


@given(scenario=scenarios)
def test_a_configuration_survives_being_written_and_read(scenario, tmp_path_factory):
    path = tmp_path_factory.mktemp("round_trip") / "config.yaml"
    path.write_text(as_yaml(scenario), encoding="utf-8")
    read = load_scenario(path)
    assert read == scenario
    assert config_hash(read) == config_hash(scenario)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_loras:", "max_lora:", ("engine.max_lora:", "unknown key", "'max_loras'")),
        ("duration_s:", "duration:", ("workload.duration:", "'duration_s'")),
        ("count:", "cuont:", ("workload.adapters.cuont:", "'count'")),
        ("mean_input_tokens", "mean_input", ("workload.lengths.mean_input:", "mean_input_tokens")),
        ("max_loras: 32, ", "", ("engine.max_loras: missing",)),
        ("max_loras: 32", "max_loras: 32.5", ("engine.max_loras", "whole number", "32.5")),
        ("max_loras: 32", "max_loras: yes", ("engine.max_loras", "whole number", "True")),
        ("model: llama-3.1-8b-instruct", "model: 8", ("engine.model", "text")),
        ("duration_s: 3600", "duration_s: 1e3", ("workload.duration_s", "1.0e6")),
        ("duration_s: 3600", "duration_s:", ("workload.duration_s", "nothing")),
        ("[0.1, 0.05, 0.025]", "0.1", ("workload.adapters.request_rates", "a list")),
        ("[0.1, 0.05, 0.025]", "[0.1, x]", ("workload.adapters.request_rates[1]", "'x'")),
        ("[0.1, 0.05, 0.025]", "[-0.1]", ("workload.adapters", "request_rate", "-0.1")),
        ("max_loras: 32", "max_loras: 320", ("engine.max_loras", "320", "96")),
        ("[8, 16, 16]", "[8, 32]", ("max_lora_rank", "32")),
        ("sharegpt", "sharegtp", ("workload.lengths.distribution", "'sharegpt'")),
        ("", "slo: {}\n", ("slo.ttft_ms",)),
        ("", "slo: [1]\n", ("slo", "mapping")),
        ("", "observer: 1\n", ("observer", "true or false")),
        ("", "sede: 1\n", ("sede:", "'seed'")),
        ("", "seed: -1\n", ("seed",)),
        ("", "slo: &a {ttft_ms: *a}\n", ("refers to itself",)),
        ("", "a: [\n", ("not valid YAML",)),
        ("", "seed: 2024-13-01\n", ("not valid YAML",)),
    ],
)
def test_a_mistake_in_the_file_is_named_by_its_path(config_file, old, new, words):
    path = config_file(old, new)
    refused(lambda: load_scenario(path), *words)


def test_adapters_may_be_neither_a_word_nor_a_bad_list(config_file):
    short = "{count: 96, request_rates: [0.1, 0.05, 0.025], ranks: [8, 16, 16]}"
    refused(lambda: load_scenario(config_file(short, "many")), "workload.adapters", "list")
    bad = "[{name: a, rank: 8, request_rat: 1}]"
    refused(lambda: load_scenario(config_file(short, bad)), "workload.adapters[0].request_rat")


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"\xff\xfe\x00"])
def test_a_file_without_keys_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    refused(lambda: load_scenario(path))


def test_a_missing_file_is_refused_by_name(tmp_path):
    refused(lambda: load_scenario(tmp_path / "none.yaml"), "none.yaml", "No such file")


# ---------------------------------------------------------------- hash


def test_the_hash_tells_configurations_and_kinds_apart():
    assert config_hash(ENGINE) == config_hash(replace(ENGINE))
    assert config_hash(ENGINE) != config_hash(replace(ENGINE, max_loras=31))
    assert config_hash(WORKLOAD) != config_hash(WORKLOAD.lengths)
    assert len(config_hash(ENGINE)) == 12


# ---------------------------------------------------------------- runs table


def test_a_row_becomes_engine_and_workload():
    engine, workload = run_to_workload(RUN)
    assert (engine.max_loras, engine.max_cpu_loras, engine.max_lora_rank) == (64, 128, 16)
    assert engine.model == "qwen-2.5-7b-instruct"
    assert workload.adapters == deal_adapters(128, [0.1, 0.05, 0.025], [8, 16])
    assert workload.duration_s == 3600.06
    assert workload.lengths == Lengths(mean_input_tokens=222.7, mean_output_tokens=196.1)


def test_measured_columns_are_never_read():
    class Row(dict):
        def __getitem__(self, column):
            assert column in RUN, f"read {column}"
            return super().__getitem__(column)

    measured = {"total_throughput": 1.0, "status": "ok", "running_max": 3, "rate_counts": "1"}
    assert run_to_workload(Row(RUN | measured)) == run_to_workload(RUN)


def test_runs_that_never_started_get_the_campaigns_window_and_lengths():
    empty = {
        "duration_s": float("nan"),
        "mean_input_tokens": None,
        "mean_requested_output_tokens": float("nan"),
    }
    _, workload = run_to_workload(RUN | empty)
    assert workload.duration_s == DEFAULT_DURATION_S
    assert workload.lengths.mean_input_tokens == DEFAULT_MEAN_INPUT_TOKENS
    assert workload.lengths.mean_output_tokens == DEFAULT_MEAN_OUTPUT_TOKENS


def test_the_token_budget_grows_with_max_num_seqs():
    engine, _ = run_to_workload(RUN | {"max_num_seqs": 4096})
    assert engine.max_num_batched_tokens == 4096


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter_slots": 129}, ("run r1", "max_loras", "129", "128")),
        ({"adapter_slots": 12.5}, ("adapter_slots", "whole number")),
        ({"adapter_slots": None}, ("adapter_slots", "empty")),
        ({"served_adapters": "many"}, ("served_adapters", "many")),
        ({"rates_per_adapter": "0.1--0.05"}, ("rates_per_adapter", "0.1--0.05")),
        ({"rates_per_adapter": None}, ("rates_per_adapter", "None")),
        ({"rates_per_adapter": "nan"}, ("rates_per_adapter", "finite")),
        ({"ranks": "8-x"}, ("ranks", "8-x")),
        ({"ranks": "8-32"}, ("max_lora_rank", "32")),
        ({"max_lora_rank": 24}, ("max_lora_rank", "24")),
        ({"duration_s": -1}, ("duration_s",)),
    ],
)
def test_a_bad_cell_is_named_by_run_and_column(change, words):
    refused(lambda: run_to_workload(RUN | change), "run r1", *words)


def test_a_missing_column_is_named():
    row = {column: cell for column, cell in RUN.items() if column not in ("ranks", "run_id")}
    refused(lambda: run_to_workload(row), "ranks", "missing")


@given(rates=st.lists(st.decimals("0.00001", 10, places=5), min_size=1))
def test_rates_survive_being_joined_and_parsed(rates):
    assert parse_rates("-".join(map(str, rates))) == tuple(map(float, rates))


@given(ranks=st.lists(st.sampled_from(LORA_RANKS), min_size=1))
def test_ranks_survive_being_joined_and_parsed(ranks):
    assert parse_ranks("-".join(map(str, ranks))) == tuple(ranks)
