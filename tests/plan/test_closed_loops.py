"""Plans for clients that wait for answers: they tell what `simulate` gives, load is clients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.place import place
from adapter_twin.laws import load_calibration
from adapter_twin.plan.candidates import REPLICATIONS
from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.plan.logged import ANSWERED_S, span_s
from adapter_twin.plan.recommend import recommend
from adapter_twin.plan.steady_state import WARM_UP_S, draw_traffic, serve, warmed_up
from adapter_twin.service.metrics import service
from adapter_twin.twin.simulate import simulate
from adapter_twin.workload.files import load_scenario
from adapter_twin.workload.traffic import Arrivals, Workload

LLAMA = "llama-3.1-8b-instruct"
TRAFFIC: dict[str, Any] = {
    "adapters": {"count": 12, "request_rates": [1.0, 0.5], "ranks": [16]},
    "lengths": {"mean_input_tokens": 223, "mean_output_tokens": 198},
}


pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Demand]:
    def call(arrivals: dict[str, Any], **content: Any) -> Demand:
        traffic = {} if "request_log" in content else TRAFFIC
        told = {"model": LLAMA, **traffic, "arrivals": arrivals, **content}
        (tmp_path / "workload.yaml").write_text(yaml.safe_dump(told))
        return load_demand(tmp_path / "workload.yaml")

    return call


@pytest.mark.parametrize(
    ("arrivals", "duration_s", "warm_up_s"),
    [
        ({"max_concurrency": 8}, 1200.0, WARM_UP_S),
        ({"max_concurrency": 8, "process": "on_off", "on_s": 5, "off_s": 25}, 1200.0, WARM_UP_S),
        ({"max_concurrency": 16, "num_prompts": 400}, 9999.0, 0.0),
    ],
)
def test_recommend_expects_what_simulate_gives_for_the_same_traffic(
    load: Callable[..., Demand],
    tmp_path: Path,
    arrivals: dict[str, Any],
    duration_s: float,
    warm_up_s: float,
) -> None:
    answer = recommend(load(arrivals))
    engine = {"model": LLAMA, "max_loras": answer["adapter_slots"], "max_cpu_loras": 12}
    workload = {**TRAFFIC, "arrivals": arrivals, "duration_s": duration_s}
    file = tmp_path / "simulate.yaml"
    file.write_text(yaml.safe_dump({"engine": engine, "workload": workload}))
    scenario, figures = load_scenario(file), []
    laws = warmed_up(load_calibration("auto", LLAMA))
    for seed in range(REPLICATIONS):
        run = simulate(scenario.workload, scenario.engine, laws, seed=seed)
        figures.append(service(run.records, run.gaps, run.duration_s, warm_up_s=warm_up_s))
    for name in ("total_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "p99_itl_ms"):
        simulated = np.mean([each[name] for each in figures])
        assert answer["expected"][name]["value"] == pytest.approx(simulated), name
    sent = np.mean([each["offered_tokens_per_s"] for each in figures])
    assert answer["offered_tokens_per_s"] == pytest.approx(sent)
    assert answer["traffic"].endswith(f"at most {arrivals['max_concurrency']} requests under way")


def test_a_log_s_client_may_wait_for_places_too(
    load: Callable[..., Demand], tmp_path: Path
) -> None:
    rng, n = np.random.default_rng(0), 2000
    log = pd.DataFrame({"arrival_s": np.sort(rng.uniform(0, 600, n))})
    log["prompt_tokens"], log["output_tokens"] = rng.integers(50, 400, (2, n))
    log.assign(adapter=rng.choice(["a", "b"], n)).to_csv(tmp_path / "log.csv", index=False)
    told = {"adapters": [{"name": name, "rank": 16} for name in "ab"], "request_log": "log.csv"}
    demand = load({"max_concurrency": 6}, **told)
    answer = recommend(demand)
    workload = Workload(
        adapters=demand.adapters,
        duration_s=span_s(demand.trace) + ANSWERED_S,
        lengths=demand.lengths,
        arrivals=Arrivals(process="trace", path=str(tmp_path / "log.csv"), max_concurrency=6),
    )
    laws = warmed_up(load_calibration("auto", LLAMA))
    run = simulate(workload, demand.engine_with(answer["adapter_slots"]), laws)
    replayed = service(run.records, run.gaps, span_s(demand.trace))
    for name in ("total_throughput", "mean_ttft_ms", "p99_itl_ms"):
        assert answer["expected"][name]["value"] == pytest.approx(replayed[name], rel=2e-3), name
    free = recommend(load({}, **told))["expected"]["total_throughput"]["value"]
    assert answer["expected"]["total_throughput"]["value"] < 0.8 * free
    with pytest.raises(AdapterTwinError, match=r"^arrivals: the request_log tells; leave out all"):
        load({"max_concurrency": 6, "process": "gamma", "cv": 2}, **told)


def test_rates_are_only_shares_where_all_prompts_are_there_at_the_start(
    load: Callable[..., Demand],
) -> None:
    adapters = TRAFFIC["adapters"]
    ask = {"max_concurrency": 16, "num_prompts": 300}
    one, other = (
        recommend(load(ask, adapters={**adapters, "request_rates": rates}))
        for rates in ([1.0, 0.5], [0.002, 0.001])
    )
    for name in ("expected", "adapter_slots", "utilisation", "headroom", "binds_next"):
        assert one[name] == other[name], name


def test_load_is_the_number_of_clients(load: Callable[..., Demand]) -> None:
    demand = load({"max_concurrency": 8, "num_prompts": 100})
    calibration = load_calibration("auto", LLAMA)
    twice = draw_traffic(demand, calibration, seed=0, load=2)
    assert (twice.trace.max_concurrency, len(twice.trace)) == (16, 200)
    assert draw_traffic(demand, calibration, seed=0, load=0.01).trace.max_concurrency == 1
    answer = recommend(demand)
    rows = [row for row in answer["what_if"] if row["adapter_slots"] == answer["adapter_slots"]]
    served = [row["total_throughput"] for row in sorted(rows, key=lambda row: row["load"])]
    assert served == sorted(served), "more clients are served more, if each more slowly"
    assert "with 8 requests under way at most the load is" in answer["reason"]
    assert answer["binds"] == "clients"


def test_an_slo_that_too_many_clients_break_tells_how_many_do_not(
    load: Callable[..., Demand],
) -> None:
    slo = {"ttft_ms": 2000, "itl_ms": 24}
    many = {"max_concurrency": 100, "num_prompts": 2000}
    message = r"^slo: no number of slots meets it; .*; about (\d+) of the 100 requests may be under"
    with pytest.raises(AdapterTwinError, match=message) as refused:
        recommend(load(many, slo=slo))
    fit = int(str(refused.value).split("; about ")[1].split()[0])
    assert 1 < fit < 100
    fewer = {"max_concurrency": fit, "num_prompts": 20 * fit}
    answer = recommend(load(fewer, slo=slo))
    assert answer["binds_next"] == "slo"
    assert answer["headroom"] < 0.5
    with pytest.raises(AdapterTwinError, match=r"^slo: no number"):
        recommend(load({"max_concurrency": 2 * fit, "num_prompts": 40 * fit}, slo=slo))


def test_sessions_share_the_places_of_their_client(load: Callable[..., Demand]) -> None:
    few, many = (
        load(
            {"max_concurrency": places},
            adapters={"count": 12, "request_rates": [0.05], "ranks": [16]},
            sessions={"turns": 3, "mean_think_s": 5},
        )
        for places in (2, 200)
    )
    assert few.trace.max_concurrency == 2
    laws = load_calibration("auto", LLAMA)
    assert draw_traffic(few, laws, seed=0, load=2).trace.max_concurrency == 4
    served = [
        serve(draw_traffic(demand, laws, seed=0), demand.engine_with(12), laws).figures
        for demand in (few, many)
    ]
    assert served[0]["total_throughput"] < 0.8 * served[1]["total_throughput"]


@pytest.mark.parametrize(
    ("arrivals", "more", "message"),
    [
        ({"num_prompts": 100}, {}, "arrivals.num_prompts: all at once"),
        (
            {"num_prompts": 100, "max_concurrency": 8},
            {"sessions": {"turns": 2}},
            "arrivals.num_prompts: with sessions",
        ),
        ({"max_concurrency": 8}, {"samples": 2}, "samples: no client waits for several"),
        ({"max_concurrency": 0}, {}, "arrivals.max_concurrency: must be at least 1"),
        ({"max_concurrency": 2.5}, {}, "arrivals.max_concurrency: "),
        ({"max_concurrency": 8, "num_prompts": 10**9}, {}, "arrivals.num_prompts: "),
    ],
)
def test_clients_that_cannot_be_planned_for_are_refused(
    load: Callable[..., Demand], arrivals: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterTwinError, match=f"^{message}") as refused:
        load(arrivals, **more)
    assert "\n" not in str(refused.value)


def test_a_client_s_places_are_not_dealt_to_gpus(load: Callable[..., Demand]) -> None:
    with pytest.raises(AdapterTwinError, match=r"^arrivals.max_concurrency: a client's places"):
        place(load({"max_concurrency": 8}), jobs=1)
