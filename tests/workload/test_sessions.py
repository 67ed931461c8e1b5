"""Sessions, samples, prompts that are all there, and rates that follow a sine, as drawn."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest, spearmanr

from adapter_twin.errors import AdapterTwinError
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.trace import BASE_MODEL, Trace, generate
from adapter_twin.workload.traffic import Arrivals, Lengths, Sessions, Workload

ADAPTERS = deal_adapters(3, [4.0, 2.0, 1.0], [8])
LENGTHS = Lengths(distribution="lognormal", mean_input_tokens=50, mean_output_tokens=20)
WORKLOAD = Workload(adapters=ADAPTERS, duration_s=1000, lengths=LENGTHS)


def draw(seed: int = 0, emitted: Any = None, **changes: Any) -> Trace:
    return generate(replace(WORKLOAD, **changes), np.random.default_rng(seed), emitted=emitted)


def pieces(trace: Trace, request: int) -> list[tuple[int, int]]:
    assert trace.contents is not None
    first, last = trace.contents.first[request : request + 2]
    own = slice(first, last)
    return list(
        zip(trace.contents.piece[own].tolist(), trace.contents.end[own].tolist(), strict=True)
    )


def test_a_turn_repeats_all_prompts_and_outputs_before_it() -> None:
    lengths = Lengths(distribution="fixed", mean_input_tokens=10, mean_output_tokens=4)
    trace = draw(lengths=replace(lengths, shared_prefix_tokens=100), sessions=Sessions(turns=3))
    assert trace.prompt_tokens[:6].tolist() == [110, 124, 138] * 2
    assert trace.after is not None
    assert trace.after[:6].tolist() == [-1, 0, 1, -1, 3, 4]
    session = [(0, 100), (1, 110), (2, 114), (3, 124), (4, 128), (5, 138), (6, 142)]
    assert [pieces(trace, turn) for turn in range(3)] == [session[:3], session[:5], session]
    assert pieces(trace, 3) == [(0, 100), (7, 110), (8, 114)]  # another one shares the first piece


def test_a_session_holds_the_outputs_that_the_model_gives_not_those_requested() -> None:
    trace = draw(sessions=Sessions(turns=2), emitted=lambda tokens: np.ones_like(tokens))
    whole = draw(sessions=Sessions(turns=2))
    assert (trace.output_tokens == 1).all()
    shorter = whole.prompt_tokens - trace.prompt_tokens
    assert (shorter[0::2] == 0).all()
    assert (shorter[1::2] == whole.output_tokens[0::2] - 1).all()


def test_turns_and_think_times_have_the_means_asked_for() -> None:
    trace = draw(sessions=Sessions(turns=4.5, distribution="geometric", mean_think_s=12))
    assert trace.after is not None
    assert trace.think_s is not None
    n, opens = len(trace), np.flatnonzero(trace.after < 0)
    turns = np.diff(np.append(opens, n))
    assert turns.mean() == pytest.approx(4.5, abs=4 * turns.std() / np.sqrt(len(turns)))
    assert np.mean(turns == 1) == pytest.approx(1 / 4.5, abs=0.03)
    assert kstest(trace.think_s, "expon", args=(0, 12)).pvalue > 1e-3
    assert (np.diff(trace.arrival_s) >= 0).all()


def test_sessions_that_open_with_a_chains_first_adapter_go_along_it() -> None:
    chain = ["adapter-1", "adapter-2", "adapter-0"]
    trace = draw(sessions=Sessions(turns=5, chain=chain), base_model_request_rate=1.0)
    sessions = {tuple(turns) for turns in trace.adapter.reshape(-1, 5).tolist()}
    assert sessions == {(1, 2, 0, 1, 2), (0,) * 5, (2,) * 5, (BASE_MODEL,) * 5}
    once = draw(sessions=Sessions(chain=chain))
    assert {tuple(turns) for turns in once.adapter.reshape(-1, 3).tolist()} >= {(1, 2, 0)}


def test_samples_share_their_prompt_and_nothing_else() -> None:
    lengths = replace(LENGTHS, rank_correlation=-0.6, shared_prefix_tokens=7)
    trace, one = draw(samples=4, lengths=lengths), draw(lengths=lengths)
    assert len(trace) == 4 * len(one)
    assert (trace.arrival_s == one.arrival_s.repeat(4)).all()
    assert (trace.prompt_tokens.reshape(-1, 4) == trace.prompt_tokens[::4, None]).all()
    assert pieces(trace, 4) == pieces(trace, 7) == [(0, 7), (2, trace.prompt_tokens[4])]
    assert pieces(trace, 3) != pieces(trace, 4)
    for k in range(4):
        correlation = spearmanr(trace.prompt_tokens[k::4], trace.output_tokens[k::4]).statistic
        assert correlation == pytest.approx(-0.6, abs=0.04)


def test_prompts_that_are_all_there_are_dealt_by_the_adapters_rates() -> None:
    trace = draw(arrivals=Arrivals(num_prompts=7000, max_concurrency=5))
    assert (trace.arrival_s == 0).all()
    assert trace.max_concurrency == 5
    counts = np.bincount(trace.adapter)
    assert np.abs(counts - [4000, 2000, 1000]).max() < 4 * np.sqrt(2000)


@pytest.mark.parametrize("process", ["poisson", "gamma"])
@pytest.mark.parametrize(("amplitude", "period_s"), [(1.0, 300.0), (0.3, 7000.0)])
def test_rates_follow_the_sine(process: Any, amplitude: float, period_s: float) -> None:
    arrivals = Arrivals(process=process, amplitude=amplitude, period_s=period_s)
    time_s = draw(arrivals=arrivals).arrival_s
    swing_s = amplitude * period_s / (2 * np.pi)

    def expected_s(until_s: Any) -> Any:
        """Return the integral of the sine, by hand."""
        return until_s + swing_s - swing_s * np.cos(2 * np.pi * until_s / period_s)

    assert ((time_s > 0) & (time_s < 1000)).all()
    assert (np.diff(time_s) >= 0).all()
    total = 7 * expected_s(1000.0)
    assert len(time_s) == pytest.approx(total, abs=4 * np.sqrt(total))
    assert kstest(expected_s(time_s) / expected_s(1000.0), "uniform").pvalue > 1e-3


def test_without_a_swing_arrivals_are_those_of_before() -> None:
    steady, hardly = draw(), draw(arrivals=Arrivals(amplitude=1e-12, period_s=100))
    np.testing.assert_allclose(steady.arrival_s, hardly.arrival_s, rtol=1e-9)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda: Arrivals(amplitude=0.5), "amplitude: goes with period_s"),
        (lambda: Arrivals(period_s=5), "amplitude: goes with period_s"),
        (lambda: Arrivals(amplitude=1.5, period_s=5), "amplitude: must be at most 1"),
        (
            lambda: Arrivals(process="trace", path="x", amplitude=1, period_s=5),
            "amplitude: only for processes",
        ),
        (lambda: Arrivals(process="gamma", num_prompts=5), "num_prompts: they come all at once"),
        (lambda: Arrivals(process="on_off", off_s=5), "on_s: process on_off needs it"),
        (lambda: Arrivals(process="on_off", on_s=5), "off_s: process on_off needs it"),
        (lambda: Arrivals(process="on_off", on_s=0, off_s=5), "on_s: must be at least 0.001"),
        (lambda: Arrivals(process="on_off", on_s=5, off_s=1e9), "off_s: must be at most"),
        (lambda: Arrivals(on_s=5), "on_s: only for process on_off"),
        (lambda: Arrivals(process="on_off", on_s=5, off_s=5, cv=2), "cv: only for process gamma"),
        (
            lambda: Arrivals(process="on_off", on_s=5, off_s=5, amplitude=1, period_s=5),
            "amplitude: only for processes",
        ),
        (lambda: Arrivals(max_concurrency=0), "max_concurrency: must be at least 1"),
        (lambda: Sessions(), "turns: give their number"),
        (lambda: Sessions(turns=2.5), "turns: a fixed number is a whole one"),
        (lambda: Sessions(turns=0.5), "turns: must be at least 1"),
        (lambda: draw(sessions=Sessions(turns=2), samples=2), "samples: no client waits"),
        (lambda: draw(samples=2, arrivals=Arrivals(max_concurrency=2)), "samples: no client waits"),
        (
            lambda: draw(samples=2, arrivals=Arrivals(process="trace", path="x")),
            "sessions, samples: a replayed trace",
        ),
        (
            lambda: draw(sessions=Sessions(chain=["adapter-9"])),
            "chain: 'adapter-9' is not among the adapters; did you mean",
        ),
        (
            lambda: draw(
                adapters=deal_adapters(1, [0], [8]), sessions=Sessions(chain=["adapter-0"])
            ),
            "chain: its first adapter has no request_rate",
        ),
        (
            lambda: draw(adapters=deal_adapters(1, [0], [8]), arrivals=Arrivals(num_prompts=1)),
            "num_prompts: no adapter has a request_rate",
        ),
    ],
)
def test_what_counts_for_nothing_is_refused_in_one_line(what: Any, words: str) -> None:
    with pytest.raises(AdapterTwinError, match=f"^{words}"):
        what()


def test_a_file_says_it_all(tmp_path: Any) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text("""
engine: {model: llama-3.1-8b-instruct, max_loras: 2}
workload:
  adapters: {count: 2, request_rates: [0.1], ranks: [8]}
  duration_s: 60
  lengths: {mean_input_tokens: 223, mean_output_tokens: 198}
  arrivals: {period_s: 600, amplitude: 0.5, max_concurrency: 4}
  sessions: {turns: 4, distribution: geometric, mean_think_s: 20, chain: [adapter-0, adapter-1]}
""")
    read = load_scenario(file).workload
    assert read.sessions == Sessions(
        turns=4, distribution="geometric", mean_think_s=20, chain=["adapter-0", "adapter-1"]
    )
    assert read.arrivals == Arrivals(period_s=600, amplitude=0.5, max_concurrency=4)
