"""The chapter on GPUs, models and engines that were not measured."""

import json

import pandas as pd
import pytest

from adapter_twin.laws.prior import prior_calibration
from adapter_twin.tables import datasets
from adapter_twin.workload.shipped import facts
from study import ch17_priors
from study.ch17_priors import GPU, LATER, MODEL, WITH_ADAPTERS


def test_constants_of_the_later_engine_are_those_of_its_run() -> None:
    shipped = json.loads(
        (datasets.REPOSITORY / "data" / "engines" / f"vllm-{LATER}.json").read_text()
    )["steps"]
    fitted = ch17_priors.fit_later(pd.read_parquet(ch17_priors.REPORT))
    assert {*fitted} == {*shipped}
    for name, told in fitted.items():
        assert told == pytest.approx(shipped[name], rel=0.02), name


def test_a_prior_told_the_published_run_before_anything_was_fitted_to_it() -> None:
    requests = pd.read_parquet(ch17_priors.REPORT)
    laws = {version: prior_calibration(MODEL, GPU, version) for version in (WITH_ADAPTERS, LATER)}
    beside = ch17_priors.beside_report(requests, laws).set_index("figure")
    assert beside.loc["mean TPOT", "measured"] == pytest.approx(32.46, rel=1e-3)
    for figure in ("output throughput", "mean TPOT"):
        assert abs(beside.loc[figure, WITH_ADAPTERS]) < 8
        assert abs(beside.loc[figure, LATER]) < abs(beside.loc[figure, WITH_ADAPTERS])


def test_a_model_left_out_is_told_to_its_bars() -> None:
    errors = ch17_priors.model_errors().set_index(["model", "figure", "measure"])["value"]
    assert errors[MODEL, "total_throughput", "mape"] <= 3
    assert errors[MODEL, "mean_itl_ms", "mape"] <= 9
    assert errors[MODEL, "median_ttft_ms", "median_error"] <= 8


def test_intervals_of_priors_cover_about_what_they_say() -> None:
    covered = ch17_priors.coverage().set_index(["figure", "asked"])["covered"]
    assert (covered.xs(90.0, level="asked") >= covered.xs(80.0, level="asked")).all()
    assert covered["mean_itl_ms", 80.0] >= 70


def test_cautious_plans_serve_no_more_than_the_measured_ones() -> None:
    served = ch17_priors.served_by_priors()
    assert len(served) == 12
    assert (served["cautious"] <= served["prior"]).all()
    assert (served["cautious"] > 0).sum() <= 1


def test_a_faster_memory_makes_shorter_steps() -> None:
    steps = ch17_priors.steps_by_gpu([1], 400).set_index(["gpu", "version", "slots"])["step_ms"]
    assert steps["h200", LATER, 0] < steps["h100-80gb-sxm", LATER, 0] < steps["l40s", LATER, 0]
    with_adapters = steps.xs(ch17_priors.SLOTS, level="slots")
    alone = steps.xs((WITH_ADAPTERS, 0), level=("version", "slots"))
    assert (with_adapters.droplevel("version") > alone).all()


def test_a_gpu_that_serves_nothing_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: facts("gpus")[name] for name in ("l4", "h200", "mi300x")}
    monkeypatch.setattr(ch17_priors, "facts", {"gpus": few}.__getitem__)
    best = ch17_priors.best_by_gpu(0.1, (16, 32)).set_index("gpu")
    assert best.loc["l4"].isna().all()
    assert best.loc["h200", "served_adapters"] == 32
    assert best.loc["mi300x"].isna().all()
