"""Picks against measured grids, windows, explanations, and the chapters' tables and figures."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from adapter_twin.laws import load_calibration
from adapter_twin.learn.surrogates import FEATURES, TARGETS, fit
from adapter_twin.learn.sweep import label, read_sweep
from adapter_twin.learn.training import small_trees
from adapter_twin.plan.criterion import Criterion
from adapter_twin.plan.grid import grid_runs
from adapter_twin.tables.datasets import REPOSITORY
from adapter_twin.workload.scenario import Slo
from study import ch08_to_10, ch08_window, ch09_explain, measured_grids
from study.figures import choices

LLAMA = "llama-3.1-8b-instruct"
WORKLOAD = {"model": LLAMA, "rates_per_adapter": "0.4-0.1-0.05", "ranks": "8-16"}
SHAPE: dict[str, Any] = {
    "mean_input_tokens": 223.0,
    "mean_requested_output_tokens": 200.0,
    "zipf_exponent": 0.0,
    "arrival_cv": 1.0,
    "max_lora_rank": 16,
}


def measured(*points: tuple[int, int, float, float]) -> pd.DataFrame:
    """Return a measured grid of (N, G, throughput, mean TTFT); 100 tokens/s are offered per N."""
    columns = ["served_adapters", "adapter_slots", "total_throughput", "mean_ttft_ms"]
    table = pd.DataFrame(points, columns=columns).assign(**WORKLOAD, **SHAPE)
    return table.assign(
        feasible_start=table.total_throughput.notna(),
        offered_tokens_per_s=100.0 * table.served_adapters,
    )


GRID = measured(
    (16, 16, 1600, 40), (32, 16, 3190, 400), (32, 32, 3200, 50), (64, 16, 5000, 9e4),
    (64, 32, 4800, 9e4), (64, 64, np.nan, np.nan),
)  # fmt: skip


def pick(served: int, slots: int, throughput: float = 3200.0) -> pd.DataFrame:
    return pd.DataFrame(
        [WORKLOAD | dict(zip((*measured_grids.CONFIGURATION, "total_throughput"),
                             (served, slots, throughput), strict=True))]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("configuration", "regret", "starves"),
    [
        ((32, 32), 0.0, False),
        ((16, 16), 50.0, False),
        ((64, 32), 100.0, True),  # starved
        ((64, 64), 100.0, True),  # did not start
        ((128, 16), 100.0, True),  # nobody measured it
    ],
)
def test_regret_is_what_was_measured_at_the_pick(
    configuration: tuple[int, int], regret: float, starves: bool
) -> None:
    found = measured_grids.cost(pick(*configuration), GRID).iloc[0]
    assert (found.best_served, found.best_slots) == (32, 32)
    assert found.regret == pytest.approx(regret)
    assert found.starves == starves


def test_a_pick_among_ties_costs_only_ttft() -> None:
    costs = measured_grids.cost(pick(32, 16, 3000.0), GRID)
    assert costs.regret[0] == pytest.approx(100 * (1 - 3190 / 3200))
    assert costs.ttft_ratio[0] == 8.0
    style = measured_grids.paper_style(costs)
    assert style["half_smape_served"] == 0
    assert style["half_smape_slots"] == pytest.approx(100 * 16 / 48)
    assert style["half_smape_throughput"] == pytest.approx(100 * 200 / 6200)
    assert style["starving_picks"] == 0


def test_the_authors_rule_keeps_a_starved_point_where_a_curve_has_no_other() -> None:
    sweep = measured((16, 16, 1600, 1), (32, 16, 3200, 1), (32, 32, 100, 1), (64, 32, 9e7, 1))
    sweep = sweep.assign(
        offered_rate_req_s=np.where(sweep.adapter_slots == 32, 1e9, sweep.offered_tokens_per_s),
        pool_in=0.5,
        pool_out=0.5,
    )
    assert measured_grids.authors_picks(sweep)[
        measured_grids.CONFIGURATION
    ].to_numpy().tolist() == [[32, 16]]
    starved = sweep[sweep.adapter_slots == 32]
    assert measured_grids.authors_picks(starved)[
        measured_grids.CONFIGURATION
    ].to_numpy().tolist() == [[32, 32]]


def test_rules_of_thumb_keep_n_and_stay_on_the_grid() -> None:
    slots = {
        rule: measured_grids.thumb_picks(pick(64, 32), GRID, rule).adapter_slots[0]
        for rule in measured_grids.THUMBS
    }
    assert slots == {"G = N": 64, "G = N/4": 16, "fewest slots": 16}


def labels(rates: list[str], served: list[int]) -> pd.DataFrame:
    """Return labelled workloads with an optimum of `served` adapters on a slot each."""
    table = pd.DataFrame({"rates_per_adapter": rates, "served_adapters": served})
    return table.assign(
        model=LLAMA, ranks="8-16", **SHAPE, has_optimum=True,
        adapter_slots=table.served_adapters, total_throughput=1000.0,
    )  # fmt: skip


def test_models_do_not_learn_from_the_rates_that_judge_them() -> None:
    other = [f"{rate}" for rate in np.geomspace(0.01, 1, 20)]
    leaked = labels([*other, *["0.4-0.1-0.05"] * 20], [16] * 20 + [64] * 20)
    found = measured_grids.model_picks(GRID, leaked, "traffic", "decision tree")
    assert found[measured_grids.CONFIGURATION].to_numpy().tolist() == [[16, 16]]
    assert found.total_throughput[0] == pytest.approx(1000)


def test_a_model_never_picks_more_slots_than_adapters() -> None:
    wide = labels([f"{rate}" for rate in np.geomspace(0.01, 1, 20)], [16] * 20)
    found = measured_grids.model_picks(
        GRID, wide.assign(adapter_slots=64), "paper", "decision tree"
    )
    assert found[measured_grids.CONFIGURATION].to_numpy().tolist() == [[16, 16]]


def test_a_classifier_picks_the_most_adapters_that_it_says_are_served() -> None:
    rates = [f"{rate:.4f}" for rate in np.geomspace(0.05, 0.8, 16)]
    grid = pd.MultiIndex.from_product([rates, [16, 32, 64]], names=["rates_per_adapter", "n"])
    runs = grid.to_frame(index=False).rename(columns={"n": "served_adapters"})
    runs = runs.assign(
        model=LLAMA, ranks="8", **SHAPE, workload_id=runs.rates_per_adapter, adapter_slots=16,
        feasible_start=True, simulated=True, mean_ttft_ms=1.0,
        offered_tokens_per_s=runs.rates_per_adapter.astype(float) * 423 * runs.served_adapters,
    )  # fmt: skip
    runs["total_throughput"] = runs.offered_tokens_per_s.clip(upper=3000)
    found = measured_grids.classifier_picks(GRID, runs, Criterion(), "decision tree")
    assert found.served_adapters.tolist() == [32]  # of (0.4 + 0.1 + 0.05) / 3 requests/s each


def windows(*rows: tuple[float, int, int, float]) -> pd.DataFrame:
    """Return repeated windows of (duration, seed, N, served share); 100 tokens/s per N."""
    table = pd.DataFrame(rows, columns=["duration_s", "seed", "served_adapters", "share"])
    offered = 100.0 * table.served_adapters
    return table.assign(
        workload_id="w", adapter_slots=16, mean_ttft_ms=1.0, feasible_start=True,
        offered_tokens_per_s=offered, total_throughput=table.share * offered,
    ).drop(columns="share")  # fmt: skip


REPEATED = windows(
    (60, 0, 16, 1.0), (60, 0, 32, 0.91), (60, 1, 16, 1.0), (60, 1, 32, 0.85),
    (600, 0, 16, 1.0), (600, 0, 32, 0.89), (600, 1, 16, 1.0), (600, 1, 32, 0.89),
)  # fmt: skip


def test_the_long_windows_say_what_a_short_ones_pick_is_worth() -> None:
    judged = ch08_window.judge(REPEATED, Criterion()).set_index(["duration_s", "seed"])
    assert judged.served_adapters.to_dict() == {
        (60, 0): 32,
        (60, 1): 16,
        (600, 0): 16,
        (600, 1): 16,
    }
    assert judged.starves.to_dict() == {
        (60, 0): True,
        (60, 1): False,
        (600, 0): False,
        (600, 1): False,
    }
    assert judged.regret[60, 0] == 100
    summary = ch08_window.by_window(judged.reset_index()).set_index("duration_s")
    assert summary.same_served.to_dict() == {60: 50, 600: 100}
    assert summary.regret.to_dict() == {60: 50, 600: 0}
    assert summary.throughput_scatter[600] == 0


def test_a_margin_trades_starving_picks_for_throughput() -> None:
    table = ch08_window.by_margin(REPEATED, [0.0, 0.02])
    assert table.starves.tolist() == [25, 0]
    assert table.margin.tolist() == [0, 2]


def test_service_settles_after_an_empty_start() -> None:
    mix = WORKLOAD | {name: SHAPE[name] for name in list(SHAPE)[:2]}
    runs = grid_runs(mix, [16], [16], 600.0)
    table = ch08_window.settling(runs, load_calibration("auto", LLAMA), [0, 1])
    assert table.minute.tolist() == list(range(10))
    assert table.mean_ttft_ms[0] > table.mean_ttft_ms[5]  # first uses are read from disk


def law(n: int = 60, noise: float = 0.01) -> pd.DataFrame:
    """Return workloads whose N falls with the square root of the rate, whatever the ranks."""
    rng = np.random.default_rng(0)
    rates = np.geomspace(0.01, 1, n)
    ranks = rng.choice(["8", "16", "8-32"], n)
    factor = rates**-0.5 * np.exp(rng.normal(0, noise, n))
    return pd.DataFrame(
        {"rates_per_adapter": [f"{rate:.5f}" for rate in rates], "ranks": ranks, "model": LLAMA}
    ).assign(**SHAPE, **dict.fromkeys(TARGETS, 16 * factor))


def test_the_regression_finds_the_law_and_leaves_out_what_does_not_vary() -> None:
    fitted = ch09_explain.regress(law(), "traffic", "served_adapters")
    table = ch09_explain.coefficients(fitted).set_index("feature")
    assert set(table.index) <= {"adapter_load", "rank_load", "slot_mib"}
    spread = np.log(law().rates_per_adapter.astype(float)).std()
    assert table.percent["adapter_load"] == pytest.approx(100 * np.expm1(-0.5 * spread), rel=0.02)
    assert table.low["adapter_load"] < table.percent["adapter_load"] < table.high["adapter_load"]
    assert table.p["rank_load"] > 0.01
    assert ch09_explain.diagnostics(fitted)["r_squared"] > 0.99


def test_a_shuffled_feature_hurts_as_much_as_it_mattered() -> None:
    rows = law(noise=0.0)
    found = ch09_explain.importance(rows, rows, "traffic", "served_adapters", ["linear"])
    by_feature = found.set_index("feature").increase
    assert by_feature["adapter_load"] > 10
    assert by_feature.drop("adapter_load").abs().max() < 0.5


def test_dependence_follows_the_law() -> None:
    rows = law()
    found = ch09_explain.dependence(
        rows, "traffic", "served_adapters", ["linear"], ["adapter_load"]
    )
    assert found.predicted.is_monotonic_decreasing


def test_a_drawn_tree_speaks_of_adapters_not_of_logarithms() -> None:
    tree = fit(law(), "traffic", "served_adapters", "small tree, depth 2").regressor_
    figure = choices.small_tree(tree, list(FEATURES["traffic"](law())))
    texts = [text.get_text() for text in figure.axes[0].texts]
    predicted = [float(text.split("predicted: ")[1]) for text in texts if "predicted" in text]
    assert max(predicted) > 100
    assert "adapter_load" in texts[0]
    assert "served_adapters, small tree, depth 2" in small_trees(law())


def test_a_map_marks_the_pick_and_draws_the_frontier() -> None:
    runs = GRID.assign(simulated=True)
    figure = choices.service_map(runs, (32, 32))
    assert [len(axes.lines) for axes in figure.axes[:2]] == [1, 1]


def test_methods_are_drawn_with_what_starves() -> None:
    table = pd.DataFrame(
        {"kind": ["search", "published"], "method": ["twin", "labels"], "regret": [-0.01, 66.7],
         "starving_picks": [0, 8]}
    )  # fmt: skip
    texts = [text.get_text() for text in choices.regret(table).axes[0].texts]
    assert texts == [" -0.01", " 67, 8 starve"]


def test_an_slo_takes_optima_away_or_makes_them_smaller() -> None:
    sweep = pd.concat([GRID.assign(workload_id=name) for name in "ab"], ignore_index=True)
    sweep = sweep.assign(seed=0, slo_attainment=[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    strict = Criterion(slo=Slo(ttft_ms=100, percentile=99))
    found = ch08_to_10.price_of_slo(sweep, Criterion(), strict).iloc[0]
    assert (found.none, found.fewer, found.throughput) == (50, 50, 25)


def test_a_thin_sweep_keeps_whole_mixes_of_rates() -> None:
    table = pd.DataFrame({"rates_per_adapter": list("aabbccdd")})
    assert ch08_to_10.thin(table, 2).rates_per_adapter.tolist() == list("aacc")


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    return of_sweep(8)


def of_sweep(every: int) -> pd.DataFrame:
    """Return every n-th mix of rates of the committed sweep, of one model."""
    runs = read_sweep(REPOSITORY / "data" / "sweeps" / "paper.parquet")
    runs = ch08_to_10.thin(runs[runs["model"] == LLAMA], every)
    return runs.astype({"model": str, "rates_per_adapter": str, "ranks": str})


def test_the_anatomy_of_a_sweep_adds_up(sweep: pd.DataFrame) -> None:
    counts = ch08_to_10.anatomy(sweep, Criterion()).iloc[0]
    assert counts.runs == len(sweep) == 55 * counts.workloads
    assert counts["start refused"] + counts.hopeless + counts.simulated == counts.runs


def test_labels_never_starve_by_the_twin_that_made_them(sweep: pd.DataFrame) -> None:
    labelled = label(sweep, Criterion())
    judged = ch08_to_10.judged_by_twin(labelled[labelled.has_optimum], sweep)
    assert judged["starving"] == 0
    assert abs(judged["regret"]) < 1


def test_runs_around_the_knee_are_light_full_and_starved(sweep: pd.DataFrame) -> None:
    rates = sweep.rates_per_adapter[sweep.simulated & (sweep.served_adapters == 128)].iloc[0]
    runs = ch08_to_10.around_the_knee(sweep, Criterion(), rates)
    assert runs.served_adapters.is_monotonic_increasing
    assert [name.split(",")[0] for name in runs.run_id] == ["light", "at the optimum", "starved"]


def test_models_are_compared_with_intervals(sweep: pd.DataFrame) -> None:
    labelled = ch08_to_10.labelled_by_model(sweep, Criterion())
    models = ("linear", "decision tree")
    comparison = ch08_to_10.compare_models(labelled, models)
    assert len(comparison) == 3 * 2 * len(models)
    bounds = ch08_to_10.intervals(labelled, comparison)
    assert bounds.coverage.between(60, 100).all()
    assert (ch08_to_10.inference(labelled[LLAMA]).r_squared > 0.3).all()


def test_verdicts_are_compared_by_criterion() -> None:
    criteria = {"rule": Criterion(), "margin": Criterion(margin=0.05)}
    found = ch08_to_10.compare_verdicts(of_sweep(2), criteria, ("decision tree",))
    assert found.verdict.tolist() == ["rule", "margin"]
    assert (found.test_macro_f1 > 0.9).all()


def test_every_way_of_choosing_is_judged_by_the_same_grid(sweep: pd.DataFrame) -> None:
    twin = GRID.assign(simulated=True)
    authors = GRID.dropna().assign(
        offered_rate_req_s=GRID.offered_tokens_per_s, pool_in=1, pool_out=0
    )
    left_out = pd.concat([twin.assign(seed=0), twin.assign(seed=1)])
    worst = left_out.seed == 1
    left_out.loc[worst, "total_throughput"] = 0.5 * left_out.offered_tokens_per_s[worst]
    lowest = worst & (left_out.served_adapters == left_out.served_adapters.min())
    left_out.loc[lowest, "total_throughput"] = left_out.offered_tokens_per_s[lowest]
    table = ch08_to_10.methods(
        GRID, sweep, twin, left_out, authors, 0.0, ("decision tree",), ("decision tree",)
    ).set_index("method")
    assert table.regret["twin, fitted"] == 0
    by_seed = ch08_to_10.over_seeds(GRID, left_out, 0.0)
    assert by_seed.regret[0] == 0 < by_seed.regret[1]  # the second one dares the fewest only
    assert table.regret[ch08_to_10.LEFT_OUT] == by_seed.regret.mean()
    assert table.starving_picks["G = N, N of the twin"] == 0
    assert set(table.kind) >= {"search", "rule of thumb", "published"}
    trade = ch08_to_10.margins(GRID, twin, [0.0, 0.05])
    assert trade.margin.tolist() == [0, 5]
