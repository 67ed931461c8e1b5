"""Fleets of several kinds of GPU: bound, price, numbers, copies, and the loss of a GPU."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.hold import Bound, Held, hold
from adapter_twin.fleet.kinds import Group, Kinds, on_kind
from adapter_twin.fleet.mixed import few
from adapter_twin.fleet.place import place
from adapter_twin.fleet.proof.bound import least_cost
from adapter_twin.fleet.spare import spare
from adapter_twin.fleet.strategies import best, shortest_wait
from adapter_twin.plan.demand import Demand, load_demand
from adapter_twin.plan.recommend import recommend
from adapter_twin.workload.adapters import zipf_adapters
from adapter_twin.workload.gpu_fleet import GpuFleet, GpuKind
from adapter_twin.workload.traffic import Lengths
from study.exact import lowest_cost

LLAMA = "llama-3.1-8b-instruct"
LENGTHS = Lengths(mean_input_tokens=223, mean_output_tokens=198)
H100, L40S = "auto@h100-64gb", "auto@l40s"

pytestmark = pytest.mark.filterwarnings("ignore:.*is (an extrapolation|a prior)")

Load = Callable[[dict[str, Any]], Demand]


def kind(calibration: str, price: float | None = None, available: int | None = None) -> GpuKind:
    return GpuKind(calibration=calibration, price_per_hour=price, available=available)


def demand(*kinds: GpuKind, count: int = 6, rate: float = 40.0, **fleet: Any) -> Demand:
    """Return a demand that takes two H100 or so."""
    return Demand(
        model=LLAMA,
        adapters=zipf_adapters(count, rate, 0.5, [8]),
        lengths=LENGTHS,
        fleet=GpuFleet(kinds=kinds or (GpuKind(),), **fleet),
    )


@pytest.fixture(scope="module")
def by_price() -> Kinds:
    return Kinds.of(demand(kind(H100, 5.0), kind(L40S, 1.0), objective="price"))


@pytest.fixture(scope="module")
def placed(by_price: Kinds) -> tuple[list[Group], Bound]:
    return best(by_price, jobs=1)


def test_every_part_is_on_a_gpu_that_serves_it_and_the_cost_is_the_exact_programs(
    by_price: Kinds, placed: tuple[list[Group], Bound]
) -> None:
    groups, bound = placed
    parts = sorted(chain.from_iterable(group.parts for group in groups))
    assert parts == list(range(len(by_price.oracles[0].parts)))
    assert all(map(by_price.serves, groups))
    exact = lowest_cost(by_price)
    assert bound.price_per_hour <= exact + 1e-9
    assert exact <= by_price.cost(groups) <= 1.05 * exact


def test_the_objective_chooses_the_kind(placed: tuple[list[Group], Bound]) -> None:
    assert {group.kind for group in placed[0]} == {1}  # per request an L40S is cheaper here
    fewest = Kinds.of(demand(kind(H100, 5.0), kind(L40S, 1.0)))
    groups, bound = best(fewest, jobs=1)
    assert 0 in {group.kind for group in groups}
    assert bound.gpus <= len(groups) < len(placed[0])


def test_no_more_gpus_are_taken_than_are_available(
    by_price: Kinds, placed: tuple[list[Group], Bound]
) -> None:
    def limited(*available: int | None) -> Kinds:
        offers = zip((H100, L40S), (5.0, 1.0), available, strict=True)
        fleet = GpuFleet(kinds=tuple(kind(*offer) for offer in offers), objective="price")
        return Kinds(replace(by_price.demand, fleet=fleet), by_price.oracles)

    prices = np.ones((2, len(by_price.oracles[0].parts)))
    groups = few(limited(None, 1), prices, 0.0)
    assert groups is not None
    assert [group.kind for group in groups].count(1) <= 1
    assert by_price.cost(groups) > by_price.cost(placed[0])
    alone = Kinds.of(demand(kind(L40S, 1.0, available=2)))
    assert few(alone, prices[:1], 0.0) is None
    with pytest.raises(AdapterTwinError, match=r"^fleet.kinds\[0\].available: 2 are too few; "):
        best(alone, jobs=1)


def test_the_program_deals_parts_to_kinds_in_whole_gpus() -> None:
    prices = np.array([[0.5, 0.5, 0.5], [1.0, 1.0, np.inf]])
    costs, any_number = np.array([3.0, 1.0]), np.full(2, np.inf)
    # the third part fits the first kind only, where there is room for one of the others
    assert least_cost(prices, costs, any_number) == pytest.approx(4.0, rel=1e-5)
    assert least_cost(prices, costs, np.array([9.0, 1.0])) == pytest.approx(4.0, rel=1e-5)
    assert least_cost(prices, costs, any_number, least_gpus=4) == pytest.approx(6.0, rel=1e-5)
    with pytest.raises(AdapterTwinError, match="raise available"):
        least_cost(prices, costs, np.ones(2) / 3)


def test_a_fleet_of_one_kind_without_a_price_is_the_calibration() -> None:
    plain = replace(demand(count=8, rate=4.0), slots=(8,))
    told = replace(plain, fleet=GpuFleet(kinds=[kind("auto", available=3)]))  # type: ignore[arg-type]
    assert place(told, jobs=1) == place(plain, jobs=1)


def test_one_gpu_of_the_cheapest_kind_that_serves_all_is_taken() -> None:
    answer, placement = place(
        demand(kind(H100, 5.0), kind(L40S, 1.0), rate=2.0, objective="price"), jobs=1
    )
    assert [row["gpu"] for row in answer["replicas"]] == ["l40s"]
    assert placement.replicas[0].kind == 1
    assert answer["price_per_hour"] == answer["price_lower_bound_per_hour"] == 1.0
    assert answer["gap"] == 0
    assert answer["spare"] == {"gpus": 1, "kinds": ["l40s"], "price_per_hour": 1.0, "borne": 0}


def test_the_check_in_the_twin_has_each_gpus_own_laws(by_price: Kinds) -> None:
    lightest = np.argsort(by_price.oracles[0].parts.rate)[:2].tolist()
    few_adapters = replace(
        by_price.demand,
        adapters=tuple(by_price.demand.adapters[i] for i in lightest),
    )
    kinds = Kinds.of(replace(few_adapters, slo=None))
    held = hold(kinds, [Group(0, [0]), Group(1, [1])], Bound(2, 6.0), jobs=1)
    fast, slow = held.checked.mean_itl_ms
    assert fast < slow
    assert (held.gpus, held.price_per_hour) == (2, 6.0)


def test_copies_are_on_gpus_of_their_own_and_bear_a_loss() -> None:
    asked = demand(kind(H100, 3.0), count=6, rate=6.0, copies=2)
    answer, placement = place(asked, jobs=1)
    homes = [a for plan in placement.replicas for a in plan.adapters]
    assert all(homes.count(adapter) == 2 for adapter in range(6))
    assert answer["lower_bound"] == answer["gpus"] == 2
    assert answer["spare"] == {"gpus": 0, "kinds": [], "price_per_hour": 0.0, "borne": 2}


def test_a_spare_is_of_a_kind_that_takes_over_all_of_any_gpu(by_price: Kinds) -> None:
    held = hold(by_price, best(by_price, jobs=1)[0], Bound(1, 1.0), jobs=1)
    told = spare(held)
    assert told is not None
    assert (told["kinds"], told["borne"]) == (["l40s"], 0)
    # a GPU that only an H100 replaces
    heavy = by_price.demand
    on_h100 = Kinds.of(on_kind(heavy, heavy.fleet.kinds[0]))
    alone, _ = best(on_h100, jobs=1)
    big = Held(by_price, Bound(1, 1.0), by_price.place(alone), held.checked, repaired=0)
    assert spare(big)["kinds"] == ["h100-64gb"]  # type: ignore[index]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(fleet: dict[str, Any]) -> Demand:
        content = {
            "model": LLAMA,
            "adapters": {"count": 2, "request_rates": [1.0], "ranks": [8]},
            "lengths": {"mean_input_tokens": 223, "mean_output_tokens": 198},
            "fleet": fleet,
        }
        (tmp_path / "w.yaml").write_text(yaml.safe_dump(content))
        return load_demand(tmp_path / "w.yaml")

    return load


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"kinds": [{"gpu": "l40"}]}, r"gpu: 'l40' is unknown; did you mean"),
        (
            {"kinds": [{"price_per_hour": -1.0}]},
            r"fleet.kinds\[0\].price_per_hour: must be above 0",
        ),
        ({"kinds": [{"price_per_hour": float("inf")}]}, r"price_per_hour: "),
        ({"kinds": [{"available": 0}]}, r"fleet.kinds\[0\].available: must be at least 1, got 0"),
        ({"kinds": []}, "fleet.kinds: must not be empty"),
        ({"kinds": [{"gpu": "l40s"}, {"gpu": "l40s"}]}, r"kinds\[1\]: the same GPU as kinds\[0\]"),
        ({"objective": "price"}, r"kinds\[0\].price_per_hour: missing"),
        ({"kinds": [{"price_per_hour": 1.0}, {"gpu": "l40s"}]}, r"kinds\[1\].price_per_hour"),
        ({"objective": "speed"}, "fleet.objective: got 'speed'; use one of gpus, price"),
        ({"copies": 0}, "fleet.copies: must be at least 1"),
        ({"kind": []}, "fleet.kind: unknown key; did you mean 'kinds'"),
    ],
)
def test_what_is_wrong_with_a_fleet_is_named(load: Load, fleet: Any, message: str) -> None:
    with pytest.raises(AdapterTwinError, match=message) as error:
        place(load(fleet))
    assert "\n" not in str(error.value)


def test_what_one_gpu_is_planned_for_has_no_fleet(load: Load) -> None:
    with pytest.raises(AdapterTwinError, match=r"^fleet: "):
        recommend(load({"copies": 2}))
    with pytest.raises(AdapterTwinError, match=r"^gpus: goes with one kind of GPU"):
        shortest_wait(Kinds.of(demand(kind(H100), kind(L40S), rate=1.0)), 2)
    with pytest.raises(AdapterTwinError, match=r"^fleet.kinds\[0\].available: 1 are too few"):
        place(replace(demand(kind(H100, available=1)), slo=None), gpus=2, jobs=1)
