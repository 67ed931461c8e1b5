"""Metrics: each figure against its definition, written out plainly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from adapter_twin.errors import AdapterTwinError
from adapter_twin.service.metrics import (
    half_smape,
    is_starved,
    jain_fairness,
    mape,
    mean_interval,
    per_adapter,
    service,
    slo_attainment,
    summarize,
    weighted_percentile,
)
from adapter_twin.twin.records import Gaps, Records
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.scenario import Slo

NAN = float("nan")
WINDOW_S = 10.0

# adapter, arrival, first token, end, prompt, output, rejected
REQUESTS = [
    (0, 0.0, 0.1, 0.5, 10, 5, False),  # TTFT 100 ms, gaps of 100 ms
    (0, 1.0, 1.3, 1.9, 20, 4, False),  # TTFT 300 ms, gaps of 200 ms
    (1, 2.0, 2.2, 2.2, 30, 1, False),  # TTFT 200 ms, no gap
    (1, 3.0, 9.0, NAN, 40, 9, False),  # cut off while decoding
    (2, 4.0, NAN, NAN, 50, 9, False),  # never served
    (-1, 5.0, NAN, NAN, 60, 9, True),  # refused by the client's cap
]


def records(rows):
    names = ("adapter", "arrival_s", "first_token_s", "end_s")
    names += ("prompt_tokens", "output_tokens", "rejected")
    columns = {
        name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    for name in ("adapter", "prompt_tokens", "output_tokens"):
        columns[name] = columns[name].astype(np.int32)
    unused = dict.fromkeys(("scheduled_s", "preemptions", "load_wait_s"), np.zeros(len(rows)))
    columns |= {"cached_tokens": np.full(len(rows), -1), "refused": np.zeros(len(rows), bool)}
    return Records(**columns, **unused)


def gaps(values, counts, ends=None):
    ends = [0.0] * len(values) if ends is None else ends
    return Gaps(np.array(values, float), np.array(counts, np.int64), np.array(ends, float))


RECORDS = records(REQUESTS)
GAPS = gaps([0.1, 0.2], [4, 3], [0.5, 1.9])


# ---------------------------------------------------------------- a run


def test_throughputs_count_completed_requests_only():
    summary = summarize(RECORDS, GAPS, WINDOW_S)
    assert summary["completed_requests"] == 3
    assert summary["request_throughput"] == pytest.approx(0.3)
    assert summary["input_throughput"] == pytest.approx((10 + 20 + 30) / 10)
    assert summary["output_throughput"] == pytest.approx((5 + 4 + 1) / 10)
    assert summary["total_throughput"] == pytest.approx(7.0)


def test_latencies_are_those_of_the_benchmark_client():
    summary = summarize(RECORDS, GAPS, WINDOW_S)
    samples = {
        "ttft_ms": [100, 300, 200],
        "tpot_ms": [100, 200],  # a single token has none
        "itl_ms": [100] * 4 + [200] * 3,
    }
    for name, sample in samples.items():
        assert summary[f"mean_{name}"] == pytest.approx(np.mean(sample))
        assert summary[f"median_{name}"] == pytest.approx(np.median(sample))
        assert summary[f"p99_{name}"] == pytest.approx(np.percentile(sample, 99))


def test_a_run_that_completed_nothing_has_no_latencies_and_no_throughput():
    summary = summarize(records(REQUESTS[3:]), gaps([], []), WINDOW_S)
    assert summary["total_throughput"] == 0
    assert all(np.isnan(value) for name, value in summary.items() if name.endswith("_ms"))


def test_token_sums_do_not_overflow_32_bits():
    many = records([(0, 0.0, 0.1, 0.2, 2_000_000_000, 1, False)] * 3)
    assert summarize(many, gaps([], []), 1.0)["input_throughput"] == 6e9
    assert per_adapter(many, 1.0)["offered_tokens_per_s"].tolist() == [6e9 + 3]


@given(
    sample=st.lists(
        st.tuples(st.floats(0, 1e3, allow_subnormal=False), st.integers(0, 9)), max_size=30
    ),
    percentiles=st.lists(st.floats(0, 100), min_size=1, max_size=4),
)
def test_weighted_percentiles_equal_those_of_the_expanded_sample(sample, percentiles):
    values = np.array([value for value, _ in sample], float)
    counts = np.array([count for _, count in sample], np.int64)
    expanded = np.repeat(values, counts)
    result = weighted_percentile(values, counts, percentiles)
    if len(expanded):
        np.testing.assert_allclose(result, np.percentile(expanded, percentiles), rtol=1e-9)
    else:
        assert np.isnan(result).all()


@given(data=st.data(), size=st.integers(1, 40))
def test_a_summary_equals_numpy_over_the_completed_requests(data, size):
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    arrival, wait, decode = rng.random((3, size))
    output = rng.integers(1, 50, size)
    done = rng.random(size) < 0.7
    first, end = arrival + wait, np.where(done, arrival + wait + decode, NAN)
    rows = zip(
        rng.integers(-1, 4, size), arrival, first, end, rng.integers(1, 50, size), output,
        np.zeros(size, bool), strict=True,
    )  # fmt: skip
    summary = summarize(records(list(rows)), gaps([], []), 2.0)
    assert summary["completed_requests"] == done.sum()
    assert summary["output_throughput"] == pytest.approx(output[done].sum() / 2)
    if done.any():
        assert summary["p99_ttft_ms"] == pytest.approx(1e3 * np.percentile(wait[done], 99))
    long = done & (output > 1)
    if long.any():
        tpot = 1e3 * decode[long] / (output[long] - 1)
        assert summary["median_tpot_ms"] == pytest.approx(np.median(tpot))


# ---------------------------------------------------------------- per adapter


def test_each_adapter_has_its_own_figures():
    table = per_adapter(RECORDS, WINDOW_S)
    assert table.index.tolist() == [-1, 0, 1, 2]
    assert table["requests"].tolist() == [1, 2, 2, 1]
    assert table["completed_requests"].tolist() == [0, 2, 1, 0]
    assert table["total_throughput"].tolist() == pytest.approx([0, 3.9, 3.1, 0])
    assert table["offered_tokens_per_s"].tolist() == pytest.approx([6.9, 3.9, 8.0, 5.9])
    assert table.loc[0, "mean_ttft_ms"] == pytest.approx(200)
    assert table.loc[0, "p99_ttft_ms"] == pytest.approx(np.percentile([100, 300], 99))
    assert table.loc[0, "mean_itl_ms"] == pytest.approx((4 * 100 + 3 * 200) / 7)
    assert np.isnan(table.loc[1, "mean_itl_ms"])
    assert table.loc[1, "median_ttft_ms"] == pytest.approx(200)
    assert table.loc[2].filter(like="_ms").isna().all()


def test_adapters_add_up_to_the_run():
    table, summary = per_adapter(RECORDS, WINDOW_S), summarize(RECORDS, GAPS, WINDOW_S)
    for name in ("completed_requests", "input_throughput", "output_throughput", "total_throughput"):
        assert table[name].sum() == pytest.approx(summary[name])


# ---------------------------------------------------------------- service


def test_service_counts_every_arrival_once():
    told = service(RECORDS, GAPS, WINDOW_S)
    assert told["arrived_requests"] == 6
    assert told["completed_requests"] == 3
    assert told["unfinished_requests"] == 2
    assert told["never_started_requests"] == 1
    assert told["dropped_requests"] == 1
    assert told["offered_tokens_per_s"] == pytest.approx((210 + 37) / 10)
    assert told["total_throughput"] == pytest.approx(7.0)
    assert told["input_throughput"] == pytest.approx(6.0)
    assert told["output_throughput"] == pytest.approx(1.0)
    assert told["request_throughput"] == pytest.approx(0.3)
    assert told["starved"]


def test_a_request_without_a_first_token_counts_with_its_wait_so_far():
    told = service(RECORDS, GAPS, WINDOW_S)
    waits = [100, 300, 200, 6000, 6000, 5000]
    assert told["mean_ttft_ms"] == pytest.approx(np.mean(waits))
    assert told["median_ttft_ms"] == pytest.approx((300 + 5000) / 2)
    assert told["p99_ttft_ms"] == pytest.approx(np.percentile(waits, 99))
    assert told["completed_mean_ttft_ms"] == pytest.approx(200)
    assert told["completed_median_ttft_ms"] == pytest.approx(200)
    assert told["completed_p99_ttft_ms"] == pytest.approx(np.percentile([100, 200, 300], 99))


@pytest.mark.parametrize(("waiting", "bound"), [(0, False), (1, False), (2, True), (3, True)])
def test_ttft_is_a_lower_bound_where_the_p99_is_a_wait_that_goes_on(waiting, bound):
    rows = [(0, 0.0, 0.1, 0.5, 10, 5, False)] * (101 - waiting)
    rows += [(0, 0.0, NAN, NAN, 10, 5, False)] * waiting
    told = service(records(rows), None, WINDOW_S)
    assert told["ttft_is_lower_bound"] is bound
    assert (told["p99_ttft_ms"] > 5000) == bound


def test_latencies_between_tokens_are_those_of_completed_requests():
    told, summary = service(RECORDS, GAPS, WINDOW_S), summarize(RECORDS, GAPS, WINDOW_S)
    for label in ("mean", "median", "p99"):
        for name in ("itl_ms", "tpot_ms"):
            assert told[f"{label}_{name}"] == summary[f"{label}_{name}"]
    without = service(RECORDS, None, WINDOW_S)
    assert without["mean_itl_ms"] == pytest.approx(told["mean_itl_ms"])
    assert "p99_itl_ms" not in without


def test_the_worst_served_adapter_has_the_longest_mean_ttft():
    told = service(RECORDS, GAPS, WINDOW_S)
    assert told["worst_adapter"] == 2  # 6000 ms; the mean of adapter 1 is 3100 ms
    assert told["worst_adapter_requests"] == 1
    assert told["worst_adapter_mean_ttft_ms"] == pytest.approx(6000)
    started = service(records(REQUESTS[:4]), GAPS, WINDOW_S, adapters=deal_adapters(2, [1.0], [8]))
    assert started["worst_adapter"] == "adapter-1"
    assert started["worst_adapter_requests"] == 2
    assert started["worst_adapter_p99_ttft_ms"] == pytest.approx(np.percentile([200, 6000], 99))


def test_what_arrives_after_the_window_does_not_count():
    """A client with a limit of concurrency may send a request of the window after it."""
    late = (1, WINDOW_S + 4.0, NAN, NAN, 70, 9, False)
    told = service(records([*REQUESTS, late]), GAPS, WINDOW_S)
    assert repr(told) == repr(service(RECORDS, GAPS, WINDOW_S))


def test_a_window_leaves_out_what_the_warm_up_served():
    told = service(RECORDS, GAPS, WINDOW_S, warm_up_s=1.5)
    assert told["arrived_requests"] == 4
    assert told["completed_requests"] == 1
    # of request 1, which came before the window and ends in it, and of request 2
    assert told["total_throughput"] == pytest.approx((24 + 31) / 8.5)
    assert told["offered_tokens_per_s"] == pytest.approx((31 + 49 + 59 + 69) / 8.5)
    assert told["mean_ttft_ms"] == pytest.approx(np.mean([200, 6000, 6000, 5000]))
    assert told["completed_mean_ttft_ms"] == pytest.approx(200)
    assert told["mean_itl_ms"] == pytest.approx(200)  # the gaps of 100 ms ended before


def test_service_without_arrivals_or_adapters_has_no_figures():
    none = service(records([(0, 5.0, 5.1, 5.2, 1, 1, False)])[np.array([False])], None, WINDOW_S)
    assert none["arrived_requests"] == none["offered_tokens_per_s"] == 0
    assert np.isnan([none["mean_ttft_ms"], none["p99_ttft_ms"], none["mean_itl_ms"]]).all()
    assert not none["starved"]
    assert not none["ttft_is_lower_bound"]
    base = service(records([(-1, 0.0, 0.1, 0.5, 10, 5, False)]), None, WINDOW_S)
    assert none["worst_adapter"] is base["worst_adapter"] is None


def test_service_is_shown_as_a_table():
    told = service(RECORDS, GAPS, WINDOW_S, slo=Slo(ttft_ms=250))
    assert told["slo_attainment"] == pytest.approx(2 / 6)
    lines = repr(told).splitlines()
    assert len(lines) == len(told)
    assert lines[0].split() == ["arrived_requests", "6"]
    assert any(line.split() == ["slo_attainment", "0.3333"] for line in lines)
    assert "<td>2,933</td>" in told._repr_html_()


def test_starvation_is_strictly_below_nine_tenths_of_the_offered_load():
    assert is_starved(89.9, 100)
    assert not is_starved(90, 100)
    assert is_starved(94, 100, threshold=0.95)
    assert is_starved(np.array([89.9, 90.0, NAN]), 100).tolist() == [True, False, True]


def test_slo_attainment_judges_requests_whose_outcome_is_known():
    # TTFT 100, 300, 200, 6000 and unserved for 6000 ms; one refused
    assert slo_attainment(RECORDS, Slo(ttft_ms=250), WINDOW_S) == pytest.approx(2 / 6)
    # the unserved request may still be in time: it is left out
    assert slo_attainment(RECORDS, Slo(ttft_ms=7000), WINDOW_S) == pytest.approx(4 / 5)
    # ITL 100, 200, none needed; one refused; two unfinished
    assert slo_attainment(RECORDS, Slo(itl_ms=150), WINDOW_S) == pytest.approx(2 / 4)
    # both limits: missed TTFT decides, though unfinished
    assert slo_attainment(RECORDS, Slo(ttft_ms=250, itl_ms=50), WINDOW_S) == pytest.approx(1 / 6)


def test_slo_attainment_is_unknown_before_any_outcome():
    pending = records([(0, 9.9, NAN, NAN, 5, 5, False)])
    assert np.isnan(slo_attainment(pending, Slo(ttft_ms=1000), WINDOW_S))


@given(npst.arrays(float, st.integers(1, 30), elements=st.floats(0, 1e300)))
def test_fairness_lies_between_one_over_n_and_one(shares):
    index = jain_fairness(shares)
    assert 1 / len(shares) - 1e-9 <= index <= 1 + 1e-9


@pytest.mark.parametrize(
    ("shares", "index"),
    [([3, 3, 3], 1), ([5, 0, 0, 0], 0.25), ([0, 0], 1), ([1, 2], 0.9), ([1e-300, 1e-300], 1)],
)
def test_fairness_of_hand_checked_shares(shares, index):
    assert jain_fairness(shares) == pytest.approx(index)


# ---------------------------------------------------------------- errors of prediction


def test_mape_and_half_smape_of_a_hand_checked_example():
    measured, predicted = [100, 200], [110, 100]
    assert mape(measured, predicted) == pytest.approx((10 + 50) / 2)
    assert half_smape(measured, predicted) == pytest.approx((10 / 210 + 100 / 300) / 2 * 100)


@given(
    measured=npst.arrays(float, 5, elements=st.floats(1, 1e6)),
    error=st.floats(-0.01, 0.01).filter(lambda e: abs(e) > 1e-4),
)
def test_half_smape_is_about_half_of_a_small_mape(measured, error):
    predicted = measured * (1 + error)
    assert mape(measured, predicted) == pytest.approx(100 * abs(error))
    assert half_smape(measured, predicted) == pytest.approx(50 * abs(error), rel=0.01)


def test_predicting_zero_as_zero_is_no_error():
    assert half_smape([0, 1], [0, 1]) == 0


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: mape([0, 1], [1, 1]), "measured"),
        (lambda: mape([], []), "measured"),
        (lambda: half_smape([1, 2], [1]), "predicted"),
        (lambda: jain_fairness([]), "shares"),
        (lambda: jain_fairness([-1, 1]), "shares"),
        (lambda: service(RECORDS, GAPS, WINDOW_S, warm_up_s=WINDOW_S), "warm_up_s"),
    ],
)
def test_figures_without_meaning_are_refused(call, word):
    with pytest.raises(AdapterTwinError, match=word):
        call()


# ---------------------------------------------------------------- replications


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    sample = np.random.default_rng(0).normal(10, 2, 400)
    low, high = mean_interval(sample)
    assert (low, high) == pytest.approx((sample.mean() - 0.196, sample.mean() + 0.196), abs=0.02)
    assert mean_interval(sample) == (low, high)


def test_one_replication_says_nothing_about_the_spread():
    assert np.isnan(mean_interval([5.0])).all()
