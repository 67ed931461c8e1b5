"""What the chapter on the chain of evictions says of it."""

import pandas as pd
import pytest

from adapter_twin.laws import load_calibration
from study import ch16_chain
from study.ch16_chain import AdapterCaches, exchange, walk

LLAMA = "llama-3.1-8b-instruct"


@pytest.mark.parametrize(
    ("slots", "copies"), [(2, 1.17), (4, 1.44), (8, 2.05), (16, 3.27), (32, 6.01), (64, 10.77)]
)
def test_chains_are_as_long_as_those_of_vllms_own_classes(slots: int, copies: float) -> None:
    """Means that vLLM 0.32.0's managers gave for exchanges drawn apart from these."""
    assert exchange(slots)[0] == pytest.approx(copies, rel=0.15)


def test_where_host_memory_is_no_larger_than_the_slots_every_copy_is_read_from_disk() -> None:
    copies, reads = exchange(16, max_cpu_loras=16)
    assert copies == reads > 3
    assert exchange(16, max_cpu_loras=20)[1] < 1


def test_pinned_adapters_shorten_the_chain() -> None:
    assert exchange(32, pinned=16)[0] < 0.7 * exchange(32)[0]


def test_caches_hold_no_more_than_they_may_and_never_lose_a_pinned_adapter() -> None:
    caches = AdapterCaches(4, 5, pinned=[9])
    for start in range(30):
        caches.touch([start % 7, (start + 2) % 7])
        assert len(caches.active) <= 4
        assert len(caches.registered) <= 5
        assert set(caches.active) <= set(caches.registered)
        assert 9 in caches.active


def test_in_every_step_of_a_walk_one_adapter_joins_and_a_run_after_it_is_copied_again() -> None:
    table = walk(16, 40)
    for _, step in table.groupby("step"):
        joins = step.place[step.what == "joins"]
        again = step.place[step.what == "copied again"].to_list()
        assert len(joins) == 1
        assert again == list(range(joins.iloc[0] + 1, joins.iloc[0] + 1 + len(again)))
    assert (table.what == "copied again").sum() > 40


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    rows = [(8, 64, 0.2, 800.0, 600), (8, 8, 0.2, 0.0, 8)]
    columns = ["gpu_loras", "cpu_loras", "adapter_rates", "avg_waiting_queue"]
    table = pd.DataFrame(rows, columns=[*columns, "max_lora_loads_from_memory"])
    return table.assign(rank=8, mean_loras_by_batch=7.5)


def test_runs_without_waiting_requests_are_not_compared(runs: pd.DataFrame) -> None:
    beside = ch16_chain.measured_copies(runs, load_calibration("auto", LLAMA))
    assert beside.rule.tolist() == list(ch16_chain.RULES)
    vllm, changed = beside.ratio
    assert vllm > 1.5 * changed
    table = ch16_chain.copies_by_slots(beside)
    assert table.slots.unique().tolist() == ["8 to 64", "8"]
    assert set(table.runs) == {1}


def test_the_chain_costs_time_where_slots_bind_and_nothing_where_they_do_not() -> None:
    calibration = load_calibration("auto", LLAMA)
    cost = ch16_chain.cost(calibration, [64, 128], [2.0], seeds=1, duration_s=600.0)
    share = cost.set_index(["rule", "adapter_slots"]).loading_share
    assert share["vLLM", 64] > 3 * share["one line changed", 64]
    assert share["vLLM", 128] == share["one line changed", 128]
    ways = ch16_chain.settings(calibration, load=2.0, seeds=1, duration_s=600.0)
    by_host = ways[ways.adapter_slots == 32].set_index("max_cpu_loras").loading_share
    assert by_host[32] > 2 * by_host[33] > 2 * by_host[128]
