"""Placing a fleet: the verb, repairs, balance, and manifests."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapter_twin import cli
from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet import picture
from adapter_twin.fleet.hold import Bound, check_placement, hold
from adapter_twin.fleet.kinds import Group, Kinds
from adapter_twin.fleet.manifests import manifest, write_manifests
from adapter_twin.fleet.oracle import Oracle
from adapter_twin.fleet.place import place
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.fleet.proof.bound import lower_bound
from adapter_twin.fleet.strategies import place_and_hold, shortest_wait, spread
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.steady_state import warmed_up
from adapter_twin.workload.adapters import zipf_adapters
from adapter_twin.workload.engine_config import EngineConfig, ServeFlags
from adapter_twin.workload.gpu_fleet import GpuFleet, GpuKind
from adapter_twin.workload.scenario import Slo
from adapter_twin.workload.traffic import Lengths

LLAMA = "llama-3.1-8b-instruct"
LENGTHS = Lengths(mean_input_tokens=223, mean_output_tokens=200)
EXAMPLE = Path(__file__).parents[2] / "examples" / "place.yaml"

pytestmark = pytest.mark.filterwarnings("ignore:.*is (an extrapolation|a prior)")


@pytest.fixture(scope="module")
def laws() -> Calibration:
    return warmed_up(load_calibration("auto", LLAMA))


def demand(count: int = 60, rate: float = 40.0, **changes: Any) -> Demand:
    adapters = zipf_adapters(count, rate, 0.8, [8, 16])
    return Demand(model=LLAMA, adapters=adapters, lengths=LENGTHS, **changes)


@pytest.fixture(scope="module")
def placed() -> tuple[Demand, dict[str, Any], Placement]:
    asked = demand()
    return asked, *place(asked, jobs=1)


def test_a_placement_serves_every_adapter_and_holds_in_the_twin(
    placed: tuple[Demand, dict[str, Any], Placement], laws: Calibration
) -> None:
    asked, answer, placement = placed
    placement.check(asked)
    assert check_placement(asked, placement, laws, jobs=1).serves.all()
    # other requests than the placement was checked with
    assert check_placement(asked, placement, laws, seed=7, jobs=1).serves.all()
    assert answer["lower_bound"] <= answer["gpus"] == len(answer["replicas"])
    names = [name for row in answer["replicas"] for name in row["adapters"]]
    assert sorted(names) == sorted(adapter.name for adapter in asked.adapters)


def test_the_answer_tells_flags_service_and_hidden_waits(
    placed: tuple[Demand, dict[str, Any], Placement],
) -> None:
    _, answer, placement = placed
    for row, plan in zip(answer["replicas"], placement.replicas, strict=True):
        flags = row["vllm_args"]
        assert flags[flags.index("--max-loras") + 1] == str(plan.engine.max_loras)
        assert row["kv_cache_tokens"] > 0
        assert row["total_throughput"] >= 0.9 * row["offered_tokens_per_s"]
    waits = max(row["mean_ttft_ms"] for row in answer["replicas"]) > 1000
    assert (answer["advice"] is not None) == waits


def test_each_gpu_names_its_own_adapters_whose_folders_are_known() -> None:
    asked = demand(3, 0.5, engine=ServeFlags(lora_modules="all"))
    in_folders = tuple(replace(one, path=f"/srv/{one.name}") for one in asked.adapters)
    answer, _ = place(replace(asked, adapters=in_folders), gpus=2, jobs=1)
    for row in answer["replicas"]:
        named = row["vllm_args"][row["vllm_args"].index("--lora-modules") + 1 :]
        assert named == [f"{name}=/srv/{name}" for name in row["adapters"]]


def test_an_slo_takes_more_gpus_and_is_met(laws: Calibration) -> None:
    asked = demand(40, 25.0, slo=Slo(ttft_ms=2000, itl_ms=100))
    answer, placement = place(asked, jobs=1)
    assert all(row["slo_attainment"] >= 0.99 for row in answer["replicas"])
    assert answer["gpus"] >= place(replace(asked, slo=None), jobs=1)[0]["gpus"]
    assert check_placement(asked, placement, laws, jobs=1).serves.all()


@pytest.mark.parametrize("percentile", [80.0, 95.0])
@pytest.mark.parametrize("limit", ["ttft_ms", "itl_ms"])
def test_the_service_at_an_slos_percentile_is_kept_by_that_share_of_the_requests(
    laws: Calibration, percentile: float, limit: str
) -> None:
    def check(limit_ms: float) -> Any:
        slo = Slo(**{limit: limit_ms}, percentile=percentile)
        return check_placement(demand(8, 6.0, slo=slo), ALONE, laws, duration_s=900.0, jobs=1)

    reached_ms = check(1e9)[f"slo_{limit}"].iloc[0]
    assert check(reached_ms).slo_attainment.iloc[0] == pytest.approx(percentile / 100, abs=0.002)


ALONE = Placement(
    (
        ReplicaPlan(
            EngineConfig(model=LLAMA, max_loras=4, max_cpu_loras=8, max_lora_rank=16),
            tuple(range(8)),
            (1.0,) * 8,
        ),
    )
)


def test_a_gpu_that_starves_gives_adapters_away(
    laws: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = demand(30, 80.0)
    kinds = Kinds.of(asked)
    (oracle,) = kinds.oracles
    everything = [Group(0, list(range(len(oracle.parts))))]
    # an oracle that believes that one GPU serves it all
    monkeypatch.setattr(Kinds, "place", _place_anything)
    with pytest.raises(AdapterTwinError, match="1 of 1 GPUs do not serve in the twin"):
        hold(kinds, everything, Bound(1, 0.0), jobs=1)
    heavy = np.argsort(-oracle.parts.rate)
    first = int(np.searchsorted(np.cumsum(oracle.parts.rate[heavy]), 48.0))
    rest = heavy[first:].tolist()
    groups = [Group(0, parts) for parts in (heavy[:first].tolist(), rest[::2], rest[1::2])]
    held = hold(kinds, groups, Bound(1, 0.0), jobs=1)
    assert held.repaired >= 1
    assert held.checked.serves.all()
    assert len(held.placement.replicas) >= 3


def _place_anything(kinds: Kinds, groups: list[Group]) -> Placement:
    plans, oracle = [], kinds.oracles[0]
    for _, group in groups:
        adapters, shares = oracle.parts.adapter[group], oracle.parts.share[group]
        engine = EngineConfig(
            model=LLAMA, max_loras=min(len(group), 16), max_cpu_loras=30, max_lora_rank=16
        )
        plans.append(ReplicaPlan(engine, tuple(adapters.tolist()), tuple(shares.tolist())))
    return Placement(tuple(plans))


# Balance

loads = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)


@given(loads, st.integers(1, 8))
def test_spread_keeps_every_item_and_grahams_bound(own: list[float], gpus: int) -> None:
    groups = spread(own, gpus)
    assert sorted(item for group in groups for item in group) == list(range(len(own)))
    fullest = max(sum(own[item] for item in group) for group in groups)
    assert fullest <= sum(own) / gpus + max(own) + 1e-9


def test_hot_adapters_are_on_several_gpus_where_that_is_asked(laws: Calibration) -> None:
    asked = demand(30, 60.0)
    kinds = Kinds.of(asked, replicate_above=0.2)
    (oracle,) = kinds.oracles
    hottest = int(np.argmax([adapter.request_rate for adapter in asked.adapters]))
    parts = np.flatnonzero(oracle.parts.adapter == hottest)
    assert len(parts) > 1
    assert oracle.serve(parts) is None  # each on a GPU of its own
    placement = place_and_hold(kinds, jobs=1).placement
    homes = [plan for plan in placement.replicas if hottest in plan.adapters]
    assert len(homes) == len(parts)
    with pytest.raises(AdapterTwinError, match="replicate_above: got 0"):
        Oracle(asked, laws, replicate_above=0)


@pytest.fixture(scope="module")
def kinds() -> Kinds:
    return Kinds.of(demand(30, 20.0))


def test_more_gpus_than_needed_shorten_the_waits(kinds: Kinds) -> None:
    held = place_and_hold(kinds, jobs=1)
    fewer, more = (
        shortest_wait(kinds, len(held.placement.replicas) + extra, jobs=1) for extra in (0, 3)
    )
    assert len(more.placement.replicas) == len(held.placement.replicas) + 3
    assert more.checked.serves.all()
    longest = [one.checked.p99_ttft_ms.max() for one in (more, fewer, held)]
    assert longest == sorted(longest)


def test_a_number_of_gpus_that_cannot_serve_is_refused_with_one_that_may(kinds: Kinds) -> None:
    (oracle,) = kinds.oracles
    for gpus in {0, lower_bound(oracle) - 1, len(oracle.parts) + 1}:
        with pytest.raises(AdapterTwinError, match=r"^gpus: "):
            shortest_wait(kinds, gpus, jobs=1)


def test_an_slo_that_means_would_miss_is_held_after_a_look_at_the_twin() -> None:
    asked = demand(24, 20.0, slo=Slo(ttft_ms=5000.0, itl_ms=43.0))
    held = place_and_hold(Kinds.of(asked), jobs=1)
    assert held.kinds.oracles[0].itl_spread > 1
    assert held.checked.slo_attainment.min() >= 0.99
    assert held.bound.gpus <= held.gpus


def test_there_is_at_least_one_gpu_to_spread_over() -> None:
    with pytest.raises(AdapterTwinError, match="gpus: must be at least 1"):
        spread([1.0], 0)


# Manifests


def test_manifests_pass_the_schema_and_hold_the_flags(
    placed: tuple[Demand, dict[str, Any], Placement], tmp_path: Path
) -> None:
    import kubernetes_validate

    asked, answer, placement = placed
    *files, routes = write_manifests(tmp_path / "k8s", asked, placement)
    assert len(files) == answer["gpus"]
    kubernetes_validate.validate(yaml.safe_load(routes.read_text()), "1.30", strict=True)
    for file, row in zip(files, answer["replicas"], strict=True):
        text = file.read_text()
        assert "&id" not in text
        deployment, service = yaml.safe_load_all(text)
        for document in (deployment, service):
            kubernetes_validate.validate(document, "1.30", strict=True)
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        assert container["image"] == "vllm/vllm-openai:v0.8.5"
        probe = container["startupProbe"]
        waits_s = probe["periodSeconds"] * probe["failureThreshold"]
        engine = placement.replicas[int(file.stem.partition("-")[2])].engine
        assert waits_s > load_calibration("auto", LLAMA).memory.startup_s(engine)
        arguments = container["args"]
        at = arguments.index("--enable-lora")
        assert arguments[at : at + len(row["vllm_args"])] == row["vllm_args"]
        modules = arguments[arguments.index("--lora-modules") + 1 :]
        assert modules == [f"{name}=/adapters/{name}" for name in row["adapters"]]


def test_the_routes_send_all_requests_of_an_adapter_to_the_services_that_have_it(
    tmp_path: Path,
) -> None:
    asked = demand(6, 6.0, fleet=GpuFleet(copies=2))
    answer, placement = place(asked, jobs=1)
    written = write_manifests(tmp_path, asked, placement)[-1]
    table = json.loads(yaml.safe_load(written.read_text())["data"]["routes.json"])
    assert table.keys() == {adapter.name for adapter in asked.adapters}
    assert all(sum(shares.values()) == pytest.approx(1) for shares in table.values())
    for number, row in enumerate(answer["replicas"]):
        there = {name for name, shares in table.items() if f"replica-{number}" in shares}
        assert there == set(row["adapters"])


def test_manifests_have_the_version_and_the_nodes_of_each_gpus_kind(tmp_path: Path) -> None:
    import kubernetes_validate

    kinds = (GpuKind(), GpuKind(calibration="auto@l40s-vllm0.19.0"))
    (plan,) = ALONE.replicas
    both = Placement(
        (replace(plan, shares=(0.5,) * 8), replace(plan, shares=(0.5,) * 8, kind=1)),
    )
    asked = demand(8, 1.0, fleet=GpuFleet(kinds=kinds))
    files = write_manifests(tmp_path, asked, both)[:2]
    deployments = [next(yaml.safe_load_all(file.read_text())) for file in files]
    kubernetes_validate.validate(deployments[1], "1.30", strict=True)
    first, second = (one["spec"]["template"]["spec"] for one in deployments)
    assert first["containers"][0]["image"] == "vllm/vllm-openai:v0.8.5"
    assert second["containers"][0]["image"] == "vllm/vllm-openai:v0.19.0"
    assert second["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L40S"}


def test_a_wrong_manifest_does_not_pass(
    placed: tuple[Demand, dict[str, Any], Placement],
) -> None:
    import kubernetes_validate

    asked, _, placement = placed
    deployment, _ = manifest(
        "replica-0", asked, placement.replicas[0], load_calibration("auto", LLAMA)
    )
    deployment["spec"]["replicas"] = "one"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.30", strict=True)


def test_the_packing_has_a_bar_for_each_gpu(
    placed: tuple[Demand, dict[str, Any], Placement],
) -> None:
    asked, answer, placement = placed
    axes = picture.packing(asked, placement).axes[0]
    assert len(axes.get_yticks()) == answer["gpus"]
    assert len(axes.patches) == len(asked.adapters)


# The command


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def write(changes: dict[str, Any]) -> str:
        content = yaml.safe_load(EXAMPLE.read_text()) | changes
        path = tmp_path / "w.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def test_place_writes_manifests_and_picture(
    capsys: pytest.CaptureFixture[str], write: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    adapters = {"count": 40, "total_request_rate": 12, "zipf_exponent": 0.8, "ranks": [8]}
    options = ("--manifests", str(tmp_path / "k8s"), "--picture", str(tmp_path / "p.png"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(("place", write({"adapters": adapters}), "--json", "--jobs", "1", *options))
    assert exit_.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(list((tmp_path / "k8s").glob("replica-*.yaml"))) == answer["gpus"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": []}, "adapters"),
        ({"adapters": [{"name": "huge", "rank": 1024, "request_rate": 1.0}]}, "1024"),
        ({"base_model_request_rate": 1.0}, "base_model_request_rate"),
        ({"slo": {"ttft_ms": 1}}, "slo"),
        ({"gpu": 3}, "gpu"),
        (
            {
                "adapters": {
                    "count": 20_001,
                    "total_request_rate": 9,
                    "zipf_exponent": 1,
                    "ranks": [8],
                }
            },
            "adapters: 20,001 are more than can be placed in minutes; place up to 20,000",
        ),
    ],
)
def test_what_cannot_be_placed_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
    write: Callable[[dict[str, Any]], str],
    changes: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(("place", write(changes), "--jobs", "1"))
    told = capsys.readouterr()
    assert exit_.value.code == 2
    assert told.out == ""
    error = [line for line in told.err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert words in error[0]
