"""The interpretable models: features, splits, intervals, rules, verdicts, picks and files."""

import json
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import skops.io
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import FunctionTransformer
from sklearn.tree import DecisionTreeRegressor

from adapter_twin import __version__, cli
from adapter_twin.errors import AdapterTwinError
from adapter_twin.learn import training
from adapter_twin.learn.features import (
    CONFIGURATION,
    PAPER,
    TRAFFIC,
    configuration_features,
    paper_features,
    traffic_features,
)
from adapter_twin.learn.stored import (
    About,
    Trained,
    load_estimator,
    load_trained,
    store,
    store_estimator,
)
from adapter_twin.learn.surrogates import (
    CLASSIFIERS,
    FEATURES,
    MODELS,
    TARGETS,
    YARDSTICKS,
    chosen,
    chosen_classifier,
    compare,
    compare_classifiers,
    cross_validate,
    feature_array,
    fit,
    fit_classifier,
    split,
    to_grid,
    verdicts,
)
from adapter_twin.learn.sweep import read_sweep
from adapter_twin.learn.training import (
    MERGED_WITHIN,
    coverage,
    interval_factor,
    rules,
    train,
    train_chosen,
)
from adapter_twin.plan.criterion import Criterion
from adapter_twin.plan.grid import grid_runs
from adapter_twin.service.metrics import mape
from adapter_twin.workload.files import records, run_to_workload
from adapter_twin.workload.scenario import Slo
from study.measured_grids import pick

LLAMA = "llama-3.1-8b-instruct"
PAPER_SWEEP = Path(__file__).parents[2] / "data" / "sweeps" / "paper.parquet"
MIX: dict[str, Any] = {
    "model": LLAMA,
    "rates_per_adapter": "0.4-0.1",
    "ranks": "8-16-32",
    "mean_input_tokens": 150.0,
    "mean_requested_output_tokens": 50.0,
    "zipf_exponent": 0.5,
    "arrival_cv": 2.0,
    "max_lora_rank": 32,
}
INTERPRETABLE = [name for name in MODELS if name not in YARDSTICKS]
QUICK = ("linear", "small tree, depth 4")
QUICK_CLASSIFIERS = ("logistic regression", "small tree, depth 2")


def mixes(*changes: dict[str, Any]) -> pd.DataFrame:
    """Return a workload per change of `MIX`."""
    rows = [{"workload_id": f"w{i}", **MIX, **change} for i, change in enumerate(changes)]
    return pd.DataFrame(rows)


def workloads(count: int, ranks: tuple[str, ...] = ("8",), noise: float = 0.0) -> pd.DataFrame:
    """Return `count` rates with each of the ranks; targets follow the rate, up to the noise."""
    rng = np.random.default_rng(0)
    rates = np.exp(rng.uniform(-5, 0, count))
    rows = [
        {"rates_per_adapter": f"{rate:.6f}", "ranks": rank, "max_lora_rank": int(rank)}
        for rate in rates
        for rank in ranks
    ]
    table = mixes(*rows)
    capacity = 10 / table.rates_per_adapter.astype(float)
    factor = np.exp(rng.normal(0, noise, len(table)))
    return table.assign(**dict.fromkeys(TARGETS, capacity * factor))


def configurations(mix: pd.DataFrame, capacity_tokens_per_s: float = 600.0) -> pd.DataFrame:
    """Return simulated runs of every workload; those that offer more than the capacity starve."""
    grid = pd.DataFrame({"served_adapters": [4, 8, 16, 32, 64]}).assign(adapter_slots=4)
    keys = mix.drop(columns=list(TARGETS), errors="ignore")
    table = keys.merge(grid, how="cross")
    load = traffic_features(table).adapter_load * table.served_adapters
    return table.assign(
        feasible_start=True,
        simulated=True,
        offered_tokens_per_s=load,
        total_throughput=load.clip(upper=capacity_tokens_per_s),
        mean_ttft_ms=10.0,
        slo_attainment=1.0,
        seed=0,
    )


# Features


def test_the_papers_statistics_are_over_the_dealt_rates_and_ranks() -> None:
    found = paper_features(mixes({}).set_axis([7]))
    assert (found.index.tolist(), found.columns.tolist()) == ([7], PAPER)
    of_rates, of_ranks = [0.4, 0.1, 0.25, 0.15], [32, 8, 56 / 3, np.sqrt(896 / 9)]
    np.testing.assert_allclose(found.to_numpy()[0], of_rates + of_ranks)


def test_traffic_features_weigh_by_load() -> None:
    row = traffic_features(mixes({"ranks": "8-32"}).set_axis([7])).loc[7]
    assert row.adapter_load == pytest.approx(0.25 * 200)
    assert row.top_share == pytest.approx(0.8)
    assert row.rank_load == pytest.approx((8 * 0.4 + 32 * 0.1) / 0.5)
    assert (row.output_share, row.request_tokens) == (0.25, 200)
    assert (row.zipf_exponent, row.arrival_cv) == (0.5, 2.0)


def test_a_mix_written_twice_is_the_same_mix() -> None:
    once, twice = traffic_features(mixes({}, {"rates_per_adapter": "0.4-0.1-0.4-0.1"})).to_numpy()
    np.testing.assert_allclose(once, twice)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from([0.4, 0.1, 0.05, 0.003125]), min_size=1, max_size=4),
    st.lists(st.sampled_from([8, 16, 32]), min_size=1, max_size=3),
)
def test_features_describe_the_workloads_adapters(rates: list[float], ranks: list[int]) -> None:
    mix = {**MIX, "zipf_exponent": 0.0}
    mix |= {"rates_per_adapter": "-".join(map(str, rates)), "ranks": "-".join(map(str, ranks))}
    _, workload = run_to_workload(records(grid_runs(mix, [12], [12], 60.0))[0])
    rate = np.array([adapter.request_rate for adapter in workload.adapters])
    rank = np.array([adapter.rank for adapter in workload.adapters])
    traffic, paper = traffic_features(mixes(mix)).iloc[0], paper_features(mixes(mix)).iloc[0]
    assert traffic.adapter_load == pytest.approx(rate.mean() * 200)
    assert traffic.rank_load == pytest.approx(rank @ rate / rate.sum())
    for values, name in ((rate, "rate"), (rank, "rank")):
        of_name = paper[[f"{statistic}_{name}" for statistic in ("max", "min", "mean", "std")]]
        truth = [values.max(), values.min(), values.mean(), values.std()]
        assert of_name.tolist() == pytest.approx(truth)


def test_a_configuration_gets_the_traffic_of_its_workload_and_keeps_its_index() -> None:
    table = configurations(mixes({}, {"rates_per_adapter": "0.2"})).sample(frac=1, random_state=0)
    table = table.set_axis(range(100, 100 + len(table))).astype({"workload_id": "category"})
    found = configuration_features(table)
    assert found.columns.tolist() == TRAFFIC + CONFIGURATION
    assert found.index.equals(table.index)
    pd.testing.assert_frame_equal(found[TRAFFIC], traffic_features(table))
    np.testing.assert_allclose(found.slots_per_adapter, 4 / table.served_adapters)
    np.testing.assert_array_equal(found.offered, table.offered_tokens_per_s)
    np.testing.assert_allclose(found.slots_gib, 4 * found.slot_mib / 1024)


# Splits and the choice of a model


@settings(deadline=None, max_examples=30)
@given(st.integers(5, 60), st.integers(1, 4), st.integers(0, 100))
def test_no_rates_are_on_both_sides_of_a_split(rates: int, ranks: int, seed: int) -> None:
    names = [f"{i}" for i in range(rates) for _ in range(ranks)]
    table = pd.DataFrame({"rates_per_adapter": pd.Categorical(names)})
    parts = split(table, seed)
    train_rates, test_rates = (
        set(part.rates_per_adapter.tolist()) for part in (parts.train, parts.test)
    )
    assert not train_rates & test_rates
    assert len(train_rates | test_rates) == rates
    assert sorted([*parts.train.index, *parts.test.index]) == list(range(len(table)))
    assert len(test_rates) == np.ceil(0.2 * rates)


def looked_up() -> pd.DataFrame:
    """Return workloads whose targets are random, but the same wherever the rates are the same."""
    table = workloads(50, ("8", "16", "32"))
    values = np.repeat(np.exp(np.random.default_rng(1).normal(0, 1.5, 50)), 3)
    return table.assign(**dict.fromkeys(TARGETS, values))


@pytest.mark.parametrize("features", FEATURES)
def test_what_is_looked_up_by_the_rates_cannot_be_learnt(features: str) -> None:
    table = looked_up()
    what = features, "served_adapters", "decision tree"
    seen = fit(table, *what).predict(feature_array(features, table))
    assert mape(table.served_adapters, seen) < 1e-6
    assert mape(table.served_adapters, cross_validate(table, *what)) > 50
    errors = compare(split(table), ["decision tree"], jobs=1)
    assert (errors[["cv_mape", "test_mape"]] > 50).all(axis=None)


def test_verdicts_that_are_looked_up_by_the_rates_cannot_be_learnt() -> None:
    table = looked_up()
    runs = configurations(table)
    runs["serves"] = runs.workload_id.map(table.set_index("workload_id").served_adapters) > 1
    fitted = fit_classifier(runs, "decision tree")
    assert fitted.score(configuration_features(runs).to_numpy(), runs.serves) == 1
    errors = compare_classifiers(split(runs), ("decision tree",), jobs=1).iloc[0]
    assert max(errors.cv_macro_f1, errors.test_macro_f1) < 0.75
    assert errors.served_wrongly + errors.starved_wrongly > 20


def test_a_law_of_the_rates_is_learnt() -> None:
    errors = compare(split(workloads(50)), ["linear"], jobs=1)
    assert len(errors) == len(TARGETS) * len(FEATURES)
    assert (errors.drop(columns=["target", "features", "model"]) < 10).all(axis=None)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 100), min_size=2 * len(MODELS), max_size=2 * len(MODELS)))
def test_no_yardstick_is_chosen_however_good(scores: list[float]) -> None:
    table = pd.DataFrame({"target": "x", "model": [*MODELS] * 2, "cv_half_smape": scores})
    table["language_model"] = np.repeat(["a", "b"], len(MODELS))
    rows = chosen(table)
    own = table[table.model.isin(INTERPRETABLE)]
    lowest = own.groupby("language_model").cv_half_smape.min()
    assert set(rows.model) <= set(INTERPRETABLE)
    assert rows.set_index("language_model").cv_half_smape.to_dict() == lowest.to_dict()
    names = [*CLASSIFIERS]
    scored = pd.DataFrame({"model": names, "cv_macro_f1": scores[: len(names)]})
    best = chosen_classifier(scored)
    assert best not in YARDSTICKS
    own = scored[~scored.model.isin(YARDSTICKS)].set_index("model")
    assert own.cv_macro_f1[best] == own.cv_macro_f1.max()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1, 1000), min_size=1), st.sets(st.integers(1, 1000), min_size=1))
def test_a_prediction_goes_to_the_nearest_of_the_grid_by_ratio(
    values: list[float], grid: set[int]
) -> None:
    for value, step in zip(values, to_grid(np.array(values), grid), strict=True):
        ratio = max(step / value, value / step)
        assert step in grid
        assert all(ratio <= max(other / value, value / other) * (1 + 1e-12) for other in grid)
    assert to_grid(np.array([22.0, 23.0]), [32, 16]).tolist() == [16, 32]


# Intervals


def test_an_interval_is_as_wide_as_the_noise_and_covers_nine_of_ten() -> None:
    for noise in (0.1, 0.4):
        table = workloads(200, noise=noise)
        what = "traffic", "served_adapters", "linear"
        assert np.log(interval_factor(table, *what)) == pytest.approx(1.645 * noise, rel=0.15)
        assert 0.85 <= coverage(table, *what) <= 0.95


def test_an_interval_covers_rates_that_a_model_which_knows_its_own_by_heart_has_not_seen() -> None:
    table = looked_up()
    what = "traffic", "total_throughput", "decision tree"
    assert np.log(interval_factor(table, *what)) > 1.645 * 1.5
    assert 0.85 <= coverage(table, *what) <= 0.95


def test_a_prediction_lies_inside_its_interval() -> None:
    table = workloads(60, noise=0.2)
    row = pd.Series({"features": "traffic", "target": "adapter_slots", "model": "linear"})
    trained = train_chosen(row, table)
    value, low, high = trained.predict(table)
    np.testing.assert_allclose(high / value, trained.about.interval_factor)
    np.testing.assert_allclose(value / low, trained.about.interval_factor)
    assert 0.8 <= table.adapter_slots.between(low, high).mean() <= 1


# Files


@pytest.mark.parametrize("model", INTERPRETABLE)
def test_a_stored_model_predicts_what_it_did(model: str, tmp_path: Path) -> None:
    table = workloads(30, ("8", "16"), noise=0.2)
    for features, target in zip(FEATURES, TARGETS, strict=False):
        about = About(target, model, features, interval_factor=1.5, coverage=0.9)
        store(Trained(about, fit(table, features, target, model)), tmp_path)
        loaded = load_trained(tmp_path, target)
        assert loaded.about == about
        expected = fit(table, features, target, model).predict(feature_array(features, table))
        np.testing.assert_array_equal(loaded.predict(table)[0], expected)


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name not in YARDSTICKS])
def test_a_stored_classifier_says_what_it_did(name: str, tmp_path: Path) -> None:
    runs = verdicts(configurations(workloads(30)), Criterion())
    fitted, x = fit_classifier(runs, name), configuration_features(runs).to_numpy()
    store_estimator(fitted, tmp_path / "serves.skops")
    loaded = load_estimator(tmp_path / "serves.skops")
    np.testing.assert_array_equal(loaded.predict_proba(x), fitted.predict_proba(x))
    assert loaded.score(x, runs.serves) > 0.9


def test_a_file_that_would_run_foreign_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "served_adapters.skops"
    skops.io.dump(FunctionTransformer(subprocess.run), path)
    with pytest.raises(AdapterTwinError, match=r"holds subprocess\.run, which is no part"):
        load_trained(tmp_path, "served_adapters")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b'{"model": 1}'])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.skops"
    path.write_bytes(content)
    with pytest.raises(AdapterTwinError, match=r"x\.skops: is no stored model"):
        load_estimator(path)


def test_a_model_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError, match=r"adapter_slots\.skops: no such model; run adapter"):
        load_trained(tmp_path, "adapter_slots")


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_facts_that_are_missing_or_damaged_are_refused(tmp_path: Path, content: str | None) -> None:
    about = About("adapter_slots", "linear", "traffic", interval_factor=1.5, coverage=0.9)
    store(Trained(about, fit(workloads(20), "traffic", "adapter_slots", "linear")), tmp_path)
    facts = tmp_path / "adapter_slots.json"
    facts.unlink() if content is None else facts.write_text(content)
    with pytest.raises(AdapterTwinError, match=r"adapter_slots\.json"):
        load_trained(tmp_path, "adapter_slots")


# Small trees


def test_rules_merge_leaves_that_agree_and_speak_of_the_value_itself() -> None:
    x = np.array([[0.0, 0], [1, 0], [4, 0], [4, 1], [4, 2]])
    tree = DecisionTreeRegressor(random_state=0).fit(x, np.log([400.0, 400, 100, 101, 20]))
    assert rules(tree, ["load", "rank"]).splitlines() == [
        "load <= 2.5",
        "|   : 400  (2 workloads)",
        "load > 2.5",
        "|   rank <= 1.5",
        f"|   |   : {np.sqrt(100 * 101):.4g}  (2 workloads)",
        "|   rank > 1.5",
        "|   |   : 20  (1 workloads)",
    ]


def test_a_tree_that_always_says_the_same_is_one_rule() -> None:
    tree = DecisionTreeRegressor(random_state=0).fit([[0.0], [1.0]], np.log([100.0, 101.0]))
    assert rules(tree, ["load"]) == ": 100.5  (2 workloads)\n"


def follow(text: str, row: dict[str, int]) -> float:
    """Return what rules say of a row."""
    depth = 0
    for line in text.splitlines():
        said = line.replace("|   ", "")
        if line.count("|   ") != depth:
            continue
        if said.startswith(": "):
            return float(said.split()[1])
        name, sign, threshold = said.split()
        depth += (row[name] <= float(threshold)) == (sign == "<=")
    raise AssertionError(text)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(1, 1000)), min_size=1, max_size=20
    )
)
def test_rules_give_the_trees_prediction(rows: list[tuple[int, int, float]]) -> None:
    x = np.array([(a, b) for a, b, _ in rows], float)
    tree = DecisionTreeRegressor(max_depth=4, random_state=0)
    tree.fit(x, np.log([value for *_, value in rows]))
    text = rules(tree, ["a", "b"])
    for (a, b, _), predicted in zip(rows, np.exp(tree.predict(x)), strict=True):
        assert follow(text, {"a": a, "b": b}) == pytest.approx(predicted, rel=MERGED_WITHIN + 1e-3)


# Verdicts and picks


def test_only_simulated_runs_get_the_criterions_verdict() -> None:
    runs = configurations(mixes({})).assign(
        offered_tokens_per_s=1000.0,
        total_throughput=[1000, 905, 890, np.nan, np.nan],
        simulated=[True, True, True, False, False],
        slo_attainment=[0.98, 0.999, 0.999, np.nan, np.nan],
    )
    judged = verdicts(runs.set_axis(range(5, 10)), Criterion())
    assert judged.index.tolist() == [0, 1, 2]
    assert judged.serves.tolist() == [True, True, False]
    assert verdicts(runs, Criterion(margin=0.02)).serves.tolist() == [True, False, False]
    strict = Criterion(slo=Slo(ttft_ms=100, percentile=99))
    assert verdicts(runs, strict).serves.tolist() == [False, True, False]


def says(*probabilities: float) -> Any:
    """Return a classifier that gives the runs these probabilities of being served."""
    table = np.column_stack([1 - np.array(probabilities), probabilities])
    return SimpleNamespace(predict_proba=lambda _: table)


def offering(*tokens_per_s: float) -> pd.DataFrame:
    """Return configurations of one workload that offer so much."""
    runs = configurations(mixes({})).iloc[: len(tokens_per_s)]
    return runs.assign(offered_tokens_per_s=tokens_per_s, total_throughput=np.nan)


def test_the_highest_load_that_is_said_to_be_served_is_picked() -> None:
    picked = pick(offering(100, 300, 200, 400), says(0.9, 0.6, 0.9, 0.4), ["workload_id"])
    assert picked.index.tolist() == [1]
    assert picked.total_throughput.tolist() == [300]


def test_among_ties_the_surest_is_picked() -> None:
    picked = pick(offering(300, 298, 299, 290), says(0.6, 0.9, 0.7, 1.0), ["workload_id"])
    assert picked.index.tolist() == [1]


def test_a_workload_of_which_nothing_is_served_gets_no_pick() -> None:
    runs = configurations(mixes({}, {})).astype({"workload_id": "category"})
    picked = pick(runs, says(*[0.9] * 5, *[0.5] * 5), ["workload_id", "model"])
    assert picked.workload_id.tolist() == ["w0"]
    assert pick(runs, says(*[0.1] * 10), ["workload_id"]).empty


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=10, max_size=10))
def test_a_pick_is_served_and_no_served_tie_is_surer(rows: list[tuple[int, float]]) -> None:
    load, sure = (np.array(values) for values in zip(*rows, strict=True))
    assume((sure > 0.5).any())
    runs = configurations(mixes({}, {})).assign(offered_tokens_per_s=load.astype(float))
    picked = pick(runs, says(*sure), ["workload_id"])
    for i, workload in picked.workload_id.items():
        rivals = (sure > 0.5) & (runs.workload_id == workload)
        best = rivals & (load >= 0.99 * load[rivals].max())
        assert best.loc[i]
        assert sure[runs.index.get_loc(i)] == sure[best].max()
    assert len(picked) == runs.workload_id[sure > 0.5].nunique()


# Training


@pytest.fixture(scope="module")
def sweep() -> pd.DataFrame:
    """Return 15 mixes of rates with two of ranks of the committed sweep."""
    runs = read_sweep(PAPER_SWEEP)
    runs = runs[(runs["model"] == LLAMA) & runs.ranks.isin(["8-8-8", "16-16-32"])]
    return runs[runs.rates_per_adapter.isin(runs.rates_per_adapter.unique()[::8])]


def compare_few(patch: pytest.MonkeyPatch) -> None:
    """Compare a few quick models only."""
    patch.setattr(training.surrogates, "compare", partial(compare, models=QUICK))
    few_classifiers = partial(compare_classifiers, names=QUICK_CLASSIFIERS)
    patch.setattr(training.surrogates, "compare_classifiers", few_classifiers)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on a few quick models only."""
    compare_few(monkeypatch)


Models = tuple[Path, pd.DataFrame, pd.DataFrame]


@pytest.fixture(scope="module")
def trained(sweep: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Train on the sweep; return the folder and the two tables."""
    out = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        compare_few(patch)
        tables = train(sweep, out, Criterion(margin=0.02), jobs=1)
    return (out, *tables)


def test_training_writes_the_models_and_what_they_were_chosen_by(trained: Models) -> None:
    out, comparison, classifiers = trained
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*")} - {LLAMA}
    models = {f"{LLAMA}/{target}{end}" for target in TARGETS for end in (".skops", ".json")}
    others = {f"{LLAMA}/{name}" for name in ("serves.skops", "rules.txt", "README.md")}
    assert names == models | others | {"comparison.csv", "classifiers.csv"}
    for table, name in ((comparison, "comparison"), (classifiers, "classifiers")):
        pd.testing.assert_frame_equal(pd.read_csv(out / f"{name}.csv"), table)


def test_the_comparison_has_every_model_set_of_features_and_target(trained: Models) -> None:
    _, comparison, classifiers = trained
    errors = ["cv_half_smape", "cv_mape", "test_half_smape", "test_mape"]
    key = ["target", "features", "model"]
    assert comparison.columns.tolist() == [*key, *errors, "language_model"]
    assert len(comparison.drop_duplicates(key)) == len(TARGETS) * len(FEATURES) * len(QUICK)
    assert np.isfinite(comparison[errors]).all(axis=None)
    assert classifiers["model"].tolist() == list(QUICK_CLASSIFIERS)
    assert classifiers.cv_macro_f1.between(0.6, 1).all()


def test_the_card_says_what_was_learnt_and_how_well(trained: Models) -> None:
    out, comparison, _ = trained
    card = (out / LLAMA / "README.md").read_text()
    assert str(Criterion(margin=0.02)) in card
    assert "Trained on** 30 workloads" in card
    assert f"adapter-twin {__version__}" in card
    for row in chosen(comparison).itertuples():
        assert f"| {row.target} | {row.model} | {row.features} | {row.cv_half_smape:.2f}" in card


def test_the_rules_are_of_every_target_and_depth(trained: Models) -> None:
    text = (trained[0] / LLAMA / "rules.txt").read_text()
    for target in TARGETS:
        for depth in (2, 4, 6):
            assert f"{target}, small tree, depth {depth}\n" in text


def test_trained_models_and_classifier_answer_for_the_sweep(
    trained: Models, sweep: pd.DataFrame
) -> None:
    folder = trained[0] / LLAMA
    row = sweep.iloc[:1]
    for target in TARGETS:
        loaded = load_trained(folder, target)
        value, low, high = loaded.predict(row)
        assert low < value < high
        assert 0.7 <= loaded.about.coverage <= 1
    starts = sweep[sweep.feasible_start]
    picked = pick(starts, load_estimator(folder / "serves.skops"), ["workload_id"])
    assert picked.workload_id.nunique() == len(picked) == 30


def test_one_workload_is_predicted_in_milliseconds(trained: Models, sweep: pd.DataFrame) -> None:
    row, loaded = sweep.iloc[:1], [load_trained(trained[0] / LLAMA, name) for name in TARGETS]
    spent_s = []
    for model in loaded * 10:
        started_s = time.process_time()  # whatever else the machine does
        model.predict(row)
        spent_s.append(time.process_time() - started_s)
    assert np.median(spent_s) < 0.005  # 0.5 ms where nothing else runs


def few(sweep: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the first mixes of rates with one of ranks."""
    rates = sweep.rates_per_adapter.unique()[:count]
    return sweep[sweep.rates_per_adapter.isin(rates) & (sweep.ranks == "8-8-8")]


def test_too_few_mixes_of_rates_are_refused_before_anything_is_written(
    sweep: pd.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(AdapterTwinError, match=r"14 mixes of rates .*, 15 are needed; sweep more"):
        train(few(sweep, 14), tmp_path / "out", Criterion(), jobs=1)
    assert not (tmp_path / "out").exists()


def test_mixes_that_are_enough_to_be_accepted_are_enough_to_train(
    sweep: pd.DataFrame, quick: None, tmp_path: Path
) -> None:
    train(few(sweep, 15), tmp_path / "out", Criterion(), jobs=1)


def test_a_sweep_in_which_nothing_starves_is_refused_before_anything_is_written(
    sweep: pd.DataFrame, tmp_path: Path
) -> None:
    throughput = sweep.offered_tokens_per_s.where(sweep.simulated)
    with pytest.raises(AdapterTwinError, match=r"no simulated run starves; sweep higher rates"):
        train(sweep.assign(total_throughput=throughput), tmp_path / "out", Criterion(), jobs=1)
    assert not (tmp_path / "out").exists()


# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--margin", "0.5"), "margin: must be below 0.1"),
        (("--margin", "-0.1"), "margin: must be at least 0"),
        (("--margin", "nan"), "margin: must be finite"),
        (("--margin", "much"), "--margin"),
        ((), "none.parquet: no such file"),
    ],
)
def test_bad_usage_of_train_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    sweep = str(PAPER_SWEEP if arguments else tmp_path / "none.parquet")
    with pytest.raises(SystemExit) as exit_:
        cli.main(("train", sweep, "--out", str(tmp_path / "out"), *arguments))
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not list(tmp_path.iterdir())


def test_train_prints_what_was_chosen_as_json(
    trained: Models,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def fit_models(_: object, *rest: Any, **__: object) -> tuple[pd.DataFrame, pd.DataFrame]:
        asked.extend(rest)
        return trained[1:]

    monkeypatch.setattr(training, "train", fit_models)
    with pytest.raises(SystemExit) as exit_:
        cli.main(("train", str(PAPER_SWEEP), "--out", str(tmp_path), "--margin", "0", "--json"))
    answer = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert asked == [tmp_path, Criterion(margin=0.0)]
    assert [row["target"] for row in answer["chosen"]] == list(TARGETS)
