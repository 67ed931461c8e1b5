"""One question has one answer, whichever verb is asked."""

from typing import Any

import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.place import place
from adapter_twin.plan.criterion import DEFAULT_SLO, MARGIN, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import GRID
from adapter_twin.plan.optimum import optimum
from adapter_twin.plan.recommend import recommend
from adapter_twin.plan.search import largest_subset
from adapter_twin.tables import datasets
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.traffic import Lengths
from study import explorer

LLAMA = "llama-3.1-8b-instruct"

pytestmark = pytest.mark.filterwarnings("ignore:.*is an extrapolation")


def demand(count: int, rates: str, ranks: str, **changes: Any) -> Demand:
    adapters = deal_adapters(
        count, [float(rate) for rate in rates.split("-")], [int(rank) for rank in ranks.split("-")]
    )
    lengths = Lengths(mean_input_tokens=223, mean_output_tokens=200)
    slots = tuple(size for size in GRID if size <= count)
    told = {"model": LLAMA, "adapters": adapters, "lengths": lengths, "slots": slots}
    return Demand(**told | {"slo": DEFAULT_SLO} | changes)


@pytest.mark.parametrize(
    ("rates", "ranks"), [("0.4-0.1-0.025", "8"), ("0.05", "8-16-32"), ("0.4", "16")]
)
def test_optimum_recommend_place_and_explorer_agree(rates: str, ranks: str) -> None:
    criterion = Criterion(margin=MARGIN, slo=DEFAULT_SLO)
    mix = {
        "model": LLAMA,
        "rates_per_adapter": rates,
        "ranks": ranks,
        "mean_input_tokens": 223.0,
        "mean_requested_output_tokens": 200.0,
    }
    found = optimum(mix, criterion=criterion, jobs=1)
    served = found["served_adapters"]

    answer = recommend(demand(served, rates, ranks))
    assert answer["adapter_slots"] == found["adapter_slots"]
    assert answer["criterion"] == found["criterion"]
    for name in ("total_throughput", "mean_ttft_ms", "p99_ttft_ms"):
        assert answer["expected"][name]["value"] == pytest.approx(found[name])

    placed, placement = place(demand(served, rates, ranks), jobs=1)
    assert placed["gpus"] == placed["lower_bound"] == 1
    assert placement.replicas[0].engine.max_loras == found["adapter_slots"]

    more = GRID[GRID.index(served) + 1]
    with pytest.raises(AdapterTwinError, match=r"^(slo|adapters): "):
        recommend(demand(more, rates, ranks))

    table = datasets.read_table(explorer.TABLE, explorer.EXPLORER)
    ranked = criterion.ranked(explorer.runs_of(table, mix, DEFAULT_SLO))
    assert ranked.iloc[0].served_adapters == served
    tied = ranked[ranked.tied & (ranked.served_adapters == served)]
    assert found["adapter_slots"] in set(tied.adapter_slots)


def test_more_than_one_gpu_serves_is_two_gpus_to_place() -> None:
    placed, _ = place(demand(32, "1.6", "16"), jobs=1)
    assert placed["gpus"] == 2
    with pytest.raises(AdapterTwinError, match=r"use about 2 GPUs"):
        recommend(demand(32, "1.6", "16"))


def test_how_many_can_be_served_is_told_to_the_adapter_and_falls_with_the_load() -> None:
    served = [largest_subset(demand(48, rate, "16", slots=None)) for rate in ("0.6", "1.2", "4.8")]
    assert served == sorted(served, reverse=True)
    assert served[-1] > 0
    for rate, count in zip(("0.6", "1.2"), served, strict=False):
        whole = demand(48, rate, "16", slots=None)
        recommend(whole.subset(count))
        with pytest.raises(AdapterTwinError):
            recommend(whole.subset(count + 1))


def test_a_few_of_many_adapters_can_be_served() -> None:
    whole = demand(2000, "1.0", "16", slots=None)
    with pytest.raises(AdapterTwinError, match=r"about \d\d of the 2000 adapters, evenly chosen"):
        recommend(whole)
