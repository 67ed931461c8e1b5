"""Traces: the numbers asked for are the numbers drawn."""

import random
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest, spearmanr

from adapter_twin.errors import AdapterTwinError
from adapter_twin.tables.datasets import write_table
from adapter_twin.workload.adapters import Adapter, deal_adapters, zipf_adapters
from adapter_twin.workload.trace import BASE_MODEL, LengthMarginals, Trace, generate, read_trace
from adapter_twin.workload.traffic import Arrivals, Lengths, Workload

# most prompts short, a long tail, an empty bin: the shape of chat traffic
MARGINALS = LengthMarginals(
    prompt_edges=[4, 40, 200, 400, 1024],
    prompt_counts=[50, 20, 0, 30],
    output_edges=[4, 70, 400, 2000],
    output_counts=[45, 45, 10],
)
SHAREGPT = Lengths(mean_input_tokens=222.7, mean_output_tokens=197.3)
ADAPTERS = deal_adapters(8, [4.0, 2.0], [8])
POISSON = Arrivals()
ON_OFF = Arrivals(process="on_off", on_s=10, off_s=30)


def workload(
    adapters=ADAPTERS,
    duration_s=3600.0,
    lengths=SHAREGPT,
    arrivals=POISSON,
    base_model_request_rate=0.0,
):
    return Workload(
        adapters=adapters,
        duration_s=duration_s,
        lengths=lengths,
        arrivals=arrivals,
        base_model_request_rate=base_model_request_rate,
    )


def draw(asked, seed=0):
    return generate(asked, np.random.default_rng(seed), MARGINALS)


def same(one, other):
    return one.to_frame().equals(other.to_frame())


# ---------------------------------------------------------------- the whole trace


@given(
    rates=st.lists(st.floats(0, 3), min_size=1, max_size=5),
    base_rate=st.floats(0, 3),
    duration_s=st.floats(0.1, 100),
    arrivals=st.sampled_from(
        [POISSON, Arrivals(process="gamma"), Arrivals(process="agullo2025"), ON_OFF]
    ),
    lengths=st.builds(
        Lengths,
        distribution=st.sampled_from(["sharegpt", "lognormal"]),
        mean_input_tokens=st.floats(1, 500),
        mean_output_tokens=st.floats(1, 500),
        rank_correlation=st.floats(-1, 1),
    ),
    seed=st.integers(0, 1000),
)
def test_every_trace_is_sorted_inside_its_window_and_has_whole_tokens(
    rates, base_rate, duration_s, arrivals, lengths, seed
):
    adapters = deal_adapters(len(rates), rates, [8])
    trace = draw(workload(adapters, duration_s, lengths, arrivals, base_rate), seed)
    assert np.all(np.diff(trace.arrival_s) >= 0)
    assert np.all((trace.arrival_s >= 0) & (trace.arrival_s <= duration_s))
    assert np.all((trace.adapter >= BASE_MODEL) & (trace.adapter < len(rates)))
    idle = [BASE_MODEL] * (base_rate == 0) + [i for i, rate in enumerate(rates) if rate == 0]
    assert not np.isin(trace.adapter, idle).any()
    assert np.all(trace.prompt_tokens >= 1)
    assert np.all(trace.output_tokens >= 1)
    dtypes = list(map(str, trace.to_frame().dtypes))
    assert dtypes == ["float64", "int32", "int32", "int32"]


@pytest.mark.parametrize("arrivals", [POISSON, Arrivals(process="gamma"), ON_OFF])
def test_the_same_seed_gives_the_same_trace_and_another_seed_another(arrivals):
    asked = workload(duration_s=300, arrivals=arrivals)
    assert same(draw(asked, 1), draw(asked, 1))
    assert not same(draw(asked, 1), draw(asked, 2))


def test_workloads_that_differ_in_lengths_only_share_their_arrivals():
    one, other = (
        draw(workload(lengths=lengths))
        for lengths in (SHAREGPT, replace(SHAREGPT, distribution="lognormal", cv=2))
    )
    np.testing.assert_array_equal(one.arrival_s, other.arrival_s)
    np.testing.assert_array_equal(one.adapter, other.adapter)


def test_a_workload_without_traffic_is_an_empty_trace():
    for process in ("poisson", "gamma", "agullo2025"):
        idle = workload(deal_adapters(3, [0], [8]), arrivals=Arrivals(process=process))
        assert len(draw(idle)) == 0


def test_a_busy_hour_is_drawn_in_well_under_a_second():
    busy = workload(
        deal_adapters(384, [0.4, 0.3, 0.234], [8]), lengths=replace(SHAREGPT, rank_correlation=-0.3)
    )
    draw(busy)  # tabulates the lengths
    start = time.perf_counter()
    trace = draw(busy)
    assert len(trace) > 425_000
    assert time.perf_counter() - start < 0.3  # takes about 0.03 s; slack for a machine under load


# ---------------------------------------------------------------- arrivals


@pytest.mark.parametrize(
    "arrivals",
    [POISSON, Arrivals(process="gamma", cv=0.5), Arrivals(process="gamma", cv=3), ON_OFF],
    ids=["poisson", "regular", "bursty", "on and off"],
)
def test_each_adapter_gets_its_rate(arrivals):
    adapters = deal_adapters(3, [8.0, 2.0, 0.5], [8])
    trace = draw(workload(adapters, 20_000.0, arrivals=arrivals, base_model_request_rate=1.0))
    for index, rate in [(0, 8.0), (1, 2.0), (2, 0.5), (BASE_MODEL, 1.0)]:
        expected = rate * 20_000
        deviation = np.sqrt(arrivals.dispersion(rate) * expected)
        assert abs(np.sum(trace.adapter == index) - expected) < 4 * deviation


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_coefficient_of_variation_asked_for(cv):
    arrivals = Arrivals(process="gamma", cv=cv) if cv != 1 else Arrivals()
    one = (Adapter(name="a", rank=8, request_rate=5.0),)
    gaps = np.diff(draw(workload(one, 20_000.0, arrivals=arrivals)).arrival_s)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.03)


@pytest.mark.parametrize(("on_s", "off_s"), [(10, 30), (30, 10), (0.2, 5), (200, 50)])
@pytest.mark.parametrize("window_s", [1.0, 20.0, 400.0])
def test_counts_of_an_on_off_adapter_vary_as_the_formula_says(on_s, off_s, window_s):
    rate, adapters = 2.0, deal_adapters(200, [2.0], [8])
    arrivals = Arrivals(process="on_off", on_s=on_s, off_s=off_s)
    trace = draw(workload(adapters, 2000.0, arrivals=arrivals))
    windows = np.round(np.linspace(0, 2000, round(2000 / window_s) + 1), 6)
    counts, *_ = np.histogram2d(trace.adapter, trace.arrival_s, bins=[np.arange(201), windows])
    # variance by mean of an interrupted Poisson process that the window meets at a random time
    turns = window_s * (1 / on_s + 1 / off_s)
    settled = 1 + np.expm1(-turns) / turns
    expected = 1 + (arrivals.dispersion(rate) - 1) * settled
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.15)
    assert counts.mean() == pytest.approx(rate * window_s, rel=0.05)


def test_on_off_adapters_are_on_for_their_times_and_not_all_together():
    arrivals = Arrivals(process="on_off", on_s=20, off_s=60)
    one = draw(
        workload((Adapter(name="a", rank=8, request_rate=25.0),), 50_000.0, arrivals=arrivals)
    )
    gaps = np.diff(one.arrival_s)
    off = gaps[gaps > 1]  # while on, gaps are 10 ms
    assert off.mean() == pytest.approx(60, rel=0.15)
    assert len(off) == pytest.approx(50_000 / 80, rel=0.15)
    assert gaps[gaps <= 1].mean() == pytest.approx(1 / 100, rel=0.05)
    many = draw(workload(deal_adapters(4000, [0.1], [8]), 100.0, arrivals=arrivals))
    counts = np.histogram(many.arrival_s, bins=10, range=(0, 100))[0]
    assert counts.std() < 0.1 * counts.mean()


@pytest.mark.parametrize(("on_s", "off_s"), [(1e6, 1e-3), (1e-3, 1e-3)])
def test_an_adapter_that_is_hardly_off_or_for_no_time_is_poisson(on_s, off_s):
    one = (Adapter(name="a", rank=8, request_rate=2.0),)
    arrivals = Arrivals(process="on_off", on_s=on_s, off_s=off_s)
    times = draw(workload(one, 5000.0, arrivals=arrivals)).arrival_s
    assert kstest(np.diff(times), "expon", args=(0, 0.5)).pvalue > 1e-3


def test_poisson_gaps_are_exponential_per_adapter():
    trace = draw(workload(deal_adapters(3, [2.0, 1.0, 0.5], [8]), 5000.0))
    for index, rate in enumerate([2.0, 1.0, 0.5]):
        gaps = np.diff(trace.arrival_s[trace.adapter == index])
        assert kstest(gaps, "expon", args=(0, 1 / rate)).pvalue > 1e-3


def test_bursty_adapters_do_not_all_burst_at_the_start():
    many = deal_adapters(4000, [0.01], [8])
    trace = draw(workload(many, 400.0, arrivals=Arrivals(process="gamma", cv=4)))
    halves = np.histogram(trace.arrival_s, bins=2, range=(0, 400))[0]
    # 8,000 expected in each; bursts make the deviation up to four times Poisson's
    assert np.all(np.abs(halves - 8000) < 4 * 4 * np.sqrt(8000))
    assert len(trace) == pytest.approx(16_000, rel=0.1)


def test_gamma_with_unit_variation_is_poisson():
    one = (Adapter(name="a", rank=8, request_rate=2.0),)
    times = draw(workload(one, 5000.0, arrivals=Arrivals(process="gamma"))).arrival_s
    assert kstest(np.diff(times), "expon", args=(0, 0.5)).pvalue > 1e-3


def test_the_reference_load_generator_draws_the_same_arrivals_whatever_the_seed():
    asked = workload(arrivals=Arrivals(process="agullo2025"))
    one, other = draw(asked, 1), draw(asked, 2)
    np.testing.assert_array_equal(one.arrival_s, other.arrival_s)
    np.testing.assert_array_equal(one.adapter, other.adapter)
    assert not same(one, other)  # lengths follow the seed


def test_the_reference_load_generator_draws_from_one_stream_in_order_of_arrival():
    # event by event, as its client did: who is due next sends, then draws its next gap
    rates = [0.5, 0.25, 0.125]
    order = list(range(3))
    random.Random(0).shuffle(order)
    stream = np.random.RandomState(0)
    due = {index: stream.exponential(1 / rates[index]) for index in order}
    sent = []
    while min(due.values()) < 200:
        index = min(due, key=due.get)
        sent.append((due[index], index))
        due[index] += stream.exponential(1 / rates[index])
    asked = workload(deal_adapters(3, rates, [8]), 200.0, arrivals=Arrivals(process="agullo2025"))
    trace = draw(asked)
    assert trace.adapter.tolist() == [index for _, index in sent]
    np.testing.assert_allclose(trace.arrival_s, [time_s for time_s, _ in sent])


def test_zipf_popularity_shows_in_the_trace():
    trace = draw(workload(zipf_adapters(50, 20.0, 1.0, [8])))
    weights = 1 / np.arange(1, 51)
    shares = np.bincount(trace.adapter, minlength=50) / len(trace)
    deviation = np.sqrt(weights / weights.sum() / len(trace))
    assert np.all(np.abs(shares - weights / weights.sum()) < 4.5 * deviation)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("distribution", ["sharegpt", "lognormal"])
@pytest.mark.parametrize("means", [(222.7, 197.3), (3.2, 1.4), (1, 1), (900, 20)])
def test_lengths_have_the_mean_asked_for(distribution, means):
    lengths = Lengths(
        distribution=distribution, mean_input_tokens=means[0], mean_output_tokens=means[1]
    )
    trace = draw(workload(lengths=lengths))
    for tokens, mean in zip((trace.prompt_tokens, trace.output_tokens), means, strict=True):
        deviation = tokens.std() / np.sqrt(len(trace))
        assert abs(tokens.mean() - mean) <= 4 * deviation + 1e-9


def test_fixed_lengths_are_fixed():
    lengths = Lengths(distribution="fixed", mean_input_tokens=100, mean_output_tokens=7)
    trace = draw(workload(lengths=lengths))
    assert np.all(trace.prompt_tokens == 100)
    assert np.all(trace.output_tokens == 7)


def test_sharegpt_lengths_follow_the_histogram():
    # the histogram's own mean: nothing to rescale
    middle = np.array([22, 120, 300, 712])
    mean = float(middle @ MARGINALS.prompt_counts / 100)
    trace = draw(workload(lengths=replace(SHAREGPT, mean_input_tokens=mean)))
    shares = np.histogram(trace.prompt_tokens, MARGINALS.prompt_edges)[0] / len(trace)
    assert shares == pytest.approx([0.5, 0.2, 0.0, 0.3], abs=0.01)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_lognormal_lengths_have_the_variation_asked_for(cv):
    lengths = replace(SHAREGPT, distribution="lognormal", cv=cv)
    tokens = draw(workload(deal_adapters(8, [20.0], [8]), lengths=lengths)).prompt_tokens
    assert tokens.std() / tokens.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("distribution", ["sharegpt", "lognormal"])
@pytest.mark.parametrize("correlation", [-0.9, -0.3, 0.0, 0.3, 1.0])
def test_prompt_and_output_have_the_rank_correlation_asked_for(distribution, correlation):
    lengths = replace(SHAREGPT, distribution=distribution, rank_correlation=correlation)
    trace = draw(workload(lengths=lengths))
    measured = spearmanr(trace.prompt_tokens, trace.output_tokens).statistic
    assert measured == pytest.approx(correlation, abs=4 / np.sqrt(len(trace)))


@pytest.mark.parametrize(("distribution", "expected"), [("sharegpt", -0.4), ("lognormal", 0.0)])
def test_left_out_the_correlation_is_the_measured_one_where_lengths_are(distribution, expected):
    measured = replace(MARGINALS, rank_correlation=-0.4)
    asked = workload(lengths=replace(SHAREGPT, distribution=distribution))
    trace = generate(asked, np.random.default_rng(0), measured)
    correlation = spearmanr(trace.prompt_tokens, trace.output_tokens).statistic
    assert correlation == pytest.approx(expected, abs=4 / np.sqrt(len(trace)))


def test_correlation_leaves_the_lengths_distributions_alone():
    plain = draw(workload())
    coupled = draw(workload(lengths=replace(SHAREGPT, rank_correlation=-0.6)))
    for name in ("prompt_tokens", "output_tokens"):
        quantiles = [
            np.quantile(getattr(trace, name), [0.1, 0.5, 0.9]) for trace in (plain, coupled)
        ]
        np.testing.assert_allclose(*quantiles, rtol=0.05, atol=1)


def test_sharegpt_lengths_need_the_histogram():
    with pytest.raises(AdapterTwinError, match="sharegpt needs measured"):
        generate(workload(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt_edges": [4, 40]}, "prompt_edges"),
        ({"output_edges": [4, 3, 5, 6]}, "output_edges"),
        ({"output_edges": [-4, 3, 5, 6]}, "output_edges"),
        ({"prompt_counts": [0, 0, 0, 0]}, "prompt_counts"),
        ({"prompt_counts": [1, -1, 1, 1]}, "prompt_counts"),
        ({"prompt_counts": [], "prompt_edges": [0]}, "prompt_counts"),
    ],
)
def test_impossible_histograms_are_refused(change, field):
    with pytest.raises(AdapterTwinError, match=field):
        replace(MARGINALS, **change)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["trace.parquet", "trace.csv"])
def test_a_trace_survives_being_written_and_read(tmp_path, name):
    trace = draw(workload(duration_s=60, base_model_request_rate=1.0))
    write_table(trace.to_frame(), tmp_path / name)
    assert same(read_trace(tmp_path / name), trace)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def replay(path, duration_s=10.0):
    return workload(
        deal_adapters(2, [1], [8]), duration_s, arrivals=Arrivals(process="trace", path=str(path))
    )


def test_a_replayed_trace_is_sorted_and_cut_at_the_window(tmp_path):
    rows = pd.DataFrame(
        {
            "arrival_s": [10.0, 2.0, 9.9],
            "adapter": [0, 1, BASE_MODEL],
            "prompt_tokens": [5, 6, 7],
            "output_tokens": [1, 2, 3],
        }
    )
    rows.to_csv(tmp_path / "trace.csv", index=False)
    trace = draw(replay(tmp_path / "trace.csv"))
    assert isinstance(trace, Trace)
    assert trace.arrival_s.tolist() == [2.0, 9.9]
    assert trace.adapter.tolist() == [1, BASE_MODEL]
    assert trace.prompt_tokens.tolist() == [6, 7]
    assert trace.output_tokens.tolist() == [2, 3]


GOOD = "arrival_s,adapter,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        (GOOD, "empty"),
        ("arrival_s,adapter,prompt_tokens\n1,0,5\n", "output_tokens is missing"),
        (GOOD + "1,0,5,\n", "give at least one request with output"),
        (GOOD + "1,0,0,1\n", "prompt_tokens must be"),
        (GOOD + "1,0,1.5,1\n", "prompt_tokens must be a whole number"),
        (GOOD + "-1,0,5,1\n", "arrival_s must be a time"),
        (GOOD + "1,-2,5,1\n", "adapter '-2' is not among the adapters"),
        (GOOD + "1,adapter-9,5,1\n2,adapter-0,5,1\n", "did you mean 'adapter-1'"),
        (GOOD + "1,2,5,1\n", "adapter 2 is not in the workload"),
        (GOOD + "1,0,5,1,1,1\n1,0\n1,2,3,4,5,6,7\n", "cannot be read"),
    ],
)
def test_a_malformed_trace_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(AdapterTwinError, match=words) as caught:
        draw(replay(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_or_missing_parquet_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "trace.parquet"
    write_table(draw(workload(duration_s=60)).to_frame(), path)
    path.write_bytes(path.read_bytes()[:-50])
    for bad in (path, tmp_path / "none.parquet"):
        with pytest.raises(AdapterTwinError, match="cannot be read") as caught:
            read_trace(bad)
        assert "\n" not in str(caught.value)
