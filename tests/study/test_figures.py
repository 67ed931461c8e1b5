"""What figures draw: the very numbers of their tables, each series named in the legend."""

from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study import published_overheads
from study.figures import ablations, chain, choices, paper, twin_runs

LLAMA, QWEN = "llama-3.1-8b-instruct", "qwen-2.5-7b-instruct"
Points = list[tuple[float, float]]
Key = tuple[str, Any, Any]


def look(line: Line2D, *, marked: bool) -> Key:
    dots = line.get_linestyle() == "None"
    color = line.get_markerfacecolor() if dots else line.get_color()
    return (to_hex(color), line.get_marker() if marked else "", line.get_linestyle())


def legend(figure: Figure, *, marked: bool = False) -> dict[Key, str]:
    """Return what the legends of a figure call lines of a colour, a style and, maybe, a marker."""
    told = [*(axes.get_legend() for axes in figure.axes), *figure.legends]
    entries = [zip(one.legend_handles, one.get_texts(), strict=True) for one in told if one]
    return {
        look(handle, marked=marked): text.get_text()
        for own in entries
        for handle, text in own
        if isinstance(handle, Line2D)
    }


def series(figure: Figure, *, marked: bool = False) -> list[dict[str, Points]]:
    """Return the points of each panel by the legend's name; lines that it does not name are told.

    Reference lines, over the whole of a panel, are left out.
    """
    names = legend(figure, marked=marked)
    panels = []
    for axes in figure.axes:
        drawn: dict[str, Points] = defaultdict(list)
        for line in axes.lines:
            reference = line.get_transform() != axes.transData
            if not reference and len(line.get_xdata()):
                key = look(line, marked=marked)
                drawn[names.get(key, f"not in the legend: {key}")] += points(
                    line.get_xdata(), line.get_ydata()
                )
        for dots in axes.collections:
            if isinstance(dots, PathCollection):
                x, y = dots.get_offsets().T
                colors = np.resize(dots.get_facecolors(), (len(x), 4))
                for color, point in zip(colors, points(x, y), strict=True):
                    key = (to_hex(color), "", "None")
                    drawn[names.get(key, f"not in the legend: {key}")].append(point)
        panels.append(dict(drawn))
    return panels


def points(x: Any, y: Any) -> Points:
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def rows(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_curves_are_those_of_the_measured_runs_and_of_both_twins() -> None:
    grid = product(("measured", "ours", "authors"), (16, 32), (32, 64, 96))
    table = pd.DataFrame(grid, columns=["twin", "adapter_slots", "served_adapters"])
    table["total_throughput"] = 100.0 + np.arange(len(table))
    table["median_ttft_ms"] = table.total_throughput.where(table.twin != "authors") / 2
    figure = twin_runs.curves(table, ["total_throughput", "median_ttft_ms"])
    names = {"measured": "measured", "ours": "this twin", "authors": "the authors' twin"}
    panels = product(("total_throughput", "median_ttft_ms"), (16, 32))
    for (name, slots), drawn in zip(panels, series(figure), strict=True):
        own = table[table.adapter_slots == slots].dropna(subset=[name])
        assert drawn == {
            names[twin]: points(line.served_adapters, line[name])
            for twin, line in own.groupby("twin")
        }
    assert titles(figure)[:2] == ["16 slots", "32 slots"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log", "log"]


def test_a_map_of_slots_has_a_line_for_each_number_that_starts() -> None:
    swept = pd.DataFrame(product((8, 32), (16, 64)), columns=["adapter_slots", "served_adapters"])
    swept = swept.assign(
        feasible_start=[True, True, True, False],
        offered_tokens_per_s=10.0 * swept.served_adapters,
        total_throughput=[150.0, 400.0, 160.0, np.nan],
        p99_ttft_ms=[100.0, 9000.0, 80.0, np.nan],
    )
    served, ttft = series(twin_runs.service(swept))
    assert served.pop("8") == [(16, 150), (64, 400)]
    assert served.pop("32") == [(16, 160)]
    assert list(served.values()) == [[(16, 160), (64, 640)]]  # annotated as what is offered
    assert ttft == {"8": [(16, 0.1), (64, 9)], "32": [(16, 0.08)]}


def test_the_parts_of_a_step_are_lines_over_its_tokens() -> None:
    keys = product((LLAMA, QWEN), ("KV cache", "slots"), (32.0, 512.0))
    costs = pd.DataFrame(keys, columns=["model", "part", "tokens"])
    costs["cost"] = 1.0 + np.arange(len(costs))
    figure = twin_runs.step_costs(costs)
    assert titles(figure) == [LLAMA, QWEN]
    for (_, own), drawn in zip(costs.groupby("model"), series(figure), strict=True):
        parts = own.groupby("part")
        assert drawn == {part: points(line.tokens, line.cost) for part, line in parts}


def test_errors_outside_the_fitted_range_are_drawn_by_what_was_left_out() -> None:
    keys = product(("total_throughput", "mean_itl_ms"), ("adapter_slots", "max_lora_rank"), (2, 4))
    table = pd.DataFrame(keys, columns=["figure", "column", "times"])
    table = table.assign(seen=1.0 + np.arange(8), left_out=10.0 + np.arange(8))
    figure = ablations.extrapolation(table)
    names = ("total_throughput", "mean_itl_ms")
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    columns, fits = ("adapter slots", "rank"), ("in the fit", "left out")
    assert told == [f"{column}, {fit}" for column, fit in product(columns, fits)]
    handles = figure.legends[0].legend_handles
    assert [handle.get_marker() for handle in handles] == ["o", "o", "s", "s"]
    for name, drawn in zip(names, series(figure), strict=True):
        own = table[table.figure == name]
        assert [sorted(line) for line in drawn.values()] == [
            sorted(points(own.times, own[fit])) for fit in ("seen", "left_out")
        ]
    assert titles(figure) == ["total throughput", "mean ITL"]


def test_the_spread_over_seeds_is_drawn_in_seconds_over_the_load() -> None:
    table = pd.DataFrame(
        {"utilisation": [0.5, 1.0], "low": [100.0, 200.0], "middle": [150.0, 900.0],
         "high": [200.0, 4000.0], "spread": [2.0, 20.0]}
    )  # fmt: skip
    left, right = ablations.seed_spread(table).axes
    assert points(*left.lines[0].get_data()) == [(50, 0.15), (100, 0.9)]
    assert points(*right.lines[0].get_data()) == [(50, 2), (100, 20)]
    band = left.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.1, 4)


def test_a_learning_curve_has_both_ways_to_measure_less_and_the_whole_as_its_line() -> None:
    table = pd.DataFrame(
        [("batches", 0.1, 30, 20.0), ("engines", 0.1, 50, 40.0), ("batches", 1.0, 300, 8.0)],
        columns=["part", "share", "steps", "mean_itl_ms"],
    )
    figure = ablations.learning_curve(table)
    (drawn,) = series(figure)
    assert drawn == {
        "fewer batches of every engine": [(30, 20), (300, 8)],
        "fewer engines": [(50, 40)],
    }
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[8, 8]]


def test_copies_are_boxes_over_slots_for_both_rules() -> None:
    table = pd.DataFrame(
        [(8, "vLLM", 1.0), (8, "vLLM", 2.0), (8, "vLLM", 4.0), (8, "one line changed", 0.5),
         (64, "vLLM", 3.0), (64, "one line changed", 0.25)],
        columns=["gpu_loras", "rule", "ratio"],
    )  # fmt: skip
    axes = chain.copies(table).axes[0]
    medians = [
        sorted(float(line.get_ydata()[0]) for line in boxes.medians) for boxes in axes.containers
    ]
    assert medians == [pytest.approx([2, 3]), pytest.approx([0.25, 0.5])]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["vLLM", "one line changed"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "64"]
    assert axes.get_yscale() == "log"


def test_what_a_chain_costs_is_a_line_for_each_load_and_rule() -> None:
    grid = product((1.0, 2.0), ("vLLM", "one line changed"), (8, 64))
    table = pd.DataFrame(grid, columns=["load", "rule", "adapter_slots"])
    table["loading_share"] = np.arange(8) / 10
    table["mean_itl_ms"] = 20.0 + np.arange(8)
    table["p99_ttft_ms"] = 1000.0 * (1 + np.arange(8))
    figure = chain.cost(table)
    drawn = {"loading_share": 100, "mean_itl_ms": 1, "p99_ttft_ms": 1e-3}
    for (column, scale), axes in zip(drawn.items(), figure.axes, strict=True):
        lines = [points(*line.get_data()) for line in axes.lines if len(line.get_xdata())]
        by_line = table.groupby(["load", "rule"])
        expected = [points(own.adapter_slots, scale * own[column]) for _, own in by_line]
        np.testing.assert_allclose(sorted(lines), sorted(expected))
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"1.0", "2.0", "vLLM", "one line changed"} <= set(told)


def test_the_caching_problem_is_drawn_with_a_cross_at_the_most_that_is_served() -> None:
    grid = product(published_overheads.VARIED, (8.0, 16.0), (10.0, 20.0, 30.0))
    table = pd.DataFrame(grid, columns=["varied", "level", "adapters"])
    table["offered_tokens_per_s"] = 10 * table.adapters
    table["total_throughput"] = table.offered_tokens_per_s.clip(upper=200)  # 30 starve
    figure = paper.caching_problem(table)
    for name, axes, drawn in zip(
        published_overheads.VARIED, figure.axes, series(figure, marked=True), strict=True
    ):
        own = table[table.varied == name]
        crosses = [points(*line.get_data()) for line in axes.lines if line.get_marker() == "X"]
        assert crosses == [[(20, 200)], [(20, 200)]]
        lines = {name: line for name, line in drawn.items() if not name.startswith("not in")}
        assert lines == {
            f"{level:g}": points(line.adapters, line.total_throughput)
            for level, line in own.groupby("level")
        }
        assert axes.get_legend().get_title().get_text() == name


@pytest.mark.parametrize(
    ("draw", "x", "second", "sizes"),
    [
        (paper.memory_overhead, "adapter_slots", "running", ("medium", "large")),
        (paper.compute_overhead, "adapters", "mean_itl_ms", ("small", "medium")),
    ],
)
def test_overheads_are_drawn_by_size_rank_and_model(
    draw: Any, x: str, second: str, sizes: tuple[str, str]
) -> None:
    grid = product((LLAMA, QWEN), ("small", "medium", "large"), (8, 32), (1, 16))
    table = pd.DataFrame(grid, columns=["model", "requests", "max_lora_rank", x])
    table["total_throughput"] = 1000.0 + np.arange(len(table))
    table[second] = 10.0 + np.arange(len(table))
    if x == "adapters":
        table = table[table.model == LLAMA]
    figure = draw(table)
    shown = [(sizes[0], "total_throughput"), (sizes[1], "total_throughput"), (sizes[0], second)]
    for (size, column), axes in zip(shown, figure.axes, strict=True):
        own = table[table.requests == size]
        lines = [points(*line.get_data()) for line in axes.lines if len(line.get_xdata())]
        by_line = own.groupby(["model", "max_lora_rank"])
        assert sorted(lines) == sorted(points(line[x], line[column]) for _, line in by_line)
        assert axes.get_title() == f"{size} requests"
    told = {text.get_text() for text in figure.legends[0].get_texts()}
    assert told - {"max. rank", "model"} == {"8", "32"} | (
        {LLAMA, QWEN} if x == "adapter_slots" else set()
    )


def test_the_impact_of_a_load_is_a_bar_for_each_rank_and_size() -> None:
    grid = product(("disk", "memory"), (8, 16), ("small", "medium", "large"))
    table = pd.DataFrame(grid, columns=["source", "rank", "requests"])
    table["impact"] = 1.0 + np.arange(12)
    figure = paper.load_impact(table)
    for source, axes in zip(("disk", "memory"), figure.axes, strict=True):
        own = table[table.source == source].set_index(["requests", "rank"]).impact
        for size, bars in zip(("small", "medium", "large"), axes.containers, strict=True):
            assert [bar.get_height() for bar in bars] == own[size].to_list()


def test_partial_dependence_is_a_line_for_each_model() -> None:
    grid = product(("linear", "tree"), ("adapter_load", "rank_load"), (1.0, 50.0))
    table = pd.DataFrame(grid, columns=["model", "feature", "value"])
    table["predicted"] = 10.0 + np.arange(8)
    figure = choices.dependence(table, "N*")
    for name, drawn in zip(("adapter_load", "rank_load"), series(figure), strict=True):
        own = table[table.feature == name].groupby("model")
        assert drawn == {str(model): points(line.value, line.predicted) for model, line in own}
    assert [axes.get_xlabel() for axes in figure.axes] == ["adapter load", "rank load"]
    assert figure.axes[0].get_ylabel() == "N*"


def test_errors_of_models_are_drawn_by_features_a_panel_for_each_target() -> None:
    targets = ("served_adapters", "adapter_slots")
    grid = product(targets, ("linear", "tree"), ("paper", "traffic"))
    table = pd.DataFrame(grid, columns=["target", "model", "features"])
    table["test_half_smape"] = 1.0 + np.arange(8)
    figure = choices.model_errors(table)
    for target, drawn in zip(targets, series(figure), strict=True):
        own = table[table.target == target]
        assert drawn == {
            f"{features} features": points(part.test_half_smape, range(2))
            for features, part in own.groupby("features")
        }
    assert rows(figure.axes[0]) == ["linear", "tree"]


def test_optima_are_coloured_by_their_slots() -> None:
    table = pd.DataFrame(
        {"model": [LLAMA, LLAMA, QWEN], "adapter_load": [1.0, 10.0, 5.0],
         "served_adapters": [384, 64, 128], "adapter_slots": [32, 8, 32]}
    )  # fmt: skip
    figure = choices.optima(table)
    assert series(figure) == [{"8": [(10, 64)], "32": [(1, 384)]}, {"32": [(5, 128)]}]
    assert titles(figure) == [LLAMA, QWEN]


def test_importance_is_a_bar_with_its_interval() -> None:
    table = pd.DataFrame(
        {"model": "linear", "feature": ["adapter_load", "rank_load"], "increase": [10.0, 1.0],
         "low": [8.0, 0.5], "high": [12.0, 2.0]}
    )  # fmt: skip
    axes = choices.importance(table).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [10, 1]
    segments = axes.collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[8, 12], [0.5, 2]]
    assert rows(axes) == ["adapter load", "rank load"]


def test_indices_are_drawn_with_their_intervals_a_panel_for_each_answer() -> None:
    table = pd.DataFrame(product(("itl", "ttft"), ("a", "b")), columns=["answer", "factor"])
    table = table.assign(
        first=0.1 * np.arange(4), total=0.2 * np.arange(4), first_conf=0.01, total_conf=0.02
    )
    figure = choices.sobol(table)
    for answer, axes, drawn in zip(("itl", "ttft"), figure.axes, series(figure), strict=True):
        own = table[table.answer == answer]
        assert {name: [x for x, _ in line] for name, line in drawn.items()} == {
            "alone": own["first"].to_list(),
            "with interactions": own.total.to_list(),
        }
        halves = [np.ptp(bar[:, 0]) / 2 for own in axes.collections for bar in own.get_segments()]
        assert halves == pytest.approx([0.01, 0.01, 0.02, 0.02])
    assert titles(figure) == ["itl", "ttft"]


def test_settling_is_drawn_for_every_run() -> None:
    table = pd.DataFrame(product(("light", "full"), (0, 1)), columns=["run_id", "minute"])
    table = table.assign(mean_ttft_ms=[50.0, 40.0, 900.0, 800.0], in_flight=[0, 5, 90, 95])
    waits, in_flight = series(choices.settling(table))
    assert waits == {"light": [(0, 50), (1, 40)], "full": [(0, 900), (1, 800)]}
    assert in_flight == {"light": [(0, 0.5), (1, 5)], "full": [(0, 90), (1, 95)]}
