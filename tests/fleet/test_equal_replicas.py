"""A fleet named by a configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter_twin import cli
from adapter_twin.errors import AdapterTwinError
from adapter_twin.fleet.equal_replicas import simulate_fleet
from adapter_twin.service.predict import predict_scenario
from adapter_twin.workload.files import load_scenario

CONTENT: dict[str, Any] = {
    "engine": {
        "model": "llama-3.1-8b-instruct",
        "max_loras": 16,
        "max_cpu_loras": 48,
        "max_lora_rank": 16,
    },
    "workload": {
        "adapters": {"count": 48, "request_rates": [0.4], "ranks": [16]},
        "duration_s": 120,
        "lengths": {"mean_input_tokens": 223, "mean_output_tokens": 198},
    },
    "slo": {"ttft_ms": 2000},
}


def written(folder: Path, fleet: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, "fleet": fleet}))
    return path


def told(folder: Path, fleet: object) -> dict[str, Any]:
    return simulate_fleet(load_scenario(written(folder, fleet)))[1]


def test_a_fleet_of_one_serves_as_one_engine_does(tmp_path: Path) -> None:
    one = told(tmp_path, {"replicas": 1})
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(CONTENT))
    alone = predict_scenario(load_scenario(tmp_path / "one.yaml"))[1]
    same = ("arrived_requests", "mean_ttft_ms", "total_throughput", "slo_attainment", "starved")
    assert {name: one[name] for name in same} == pytest.approx({n: alone[n] for n in same})
    assert one["worst_adapter"] == alone["worst_adapter"]


def test_more_replicas_and_another_router_change_the_service(tmp_path: Path) -> None:
    kept = told(tmp_path, {"replicas": 2, "router": "adapter_affinity"})
    spread = told(tmp_path, {"replicas": 2, "router": {"name": "round_robin"}})
    alone = told(tmp_path, {"replicas": 1})
    assert kept["replicas"] == 2
    assert (kept["router"], spread["router"]) == ("AdapterAffinity(tolerance=1.5)", "RoundRobin()")
    assert kept["mean_ttft_ms"] < alone["mean_ttft_ms"]
    assert kept["adapter_loads"] < spread["adapter_loads"]


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"replicas": 0}, "fleet.replicas: must be at least 1, got 0"),
        ({"replicas": 2, "router": "nearest"}, "fleet.router.name: unknown name 'nearest'"),
        ({"replicas": 2, "route": "random"}, "fleet.route: unknown key; did you mean 'router'?"),
        (
            {"replicas": 2, "router": {"name": "adapter_affinity", "tolerance": 0.5}},
            "fleet.router.tolerance: must be at least 1, got 0.5",
        ),
    ],
)
def test_a_wrong_fleet_is_one_line(fleet: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterTwinError) as raised:
        told(tmp_path, fleet)
    assert str(raised.value).startswith(message)


def test_the_command_simulates_a_fleet_and_writes_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path, {"replicas": 2}), tmp_path / "records.csv"
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", str(path), "--json", "--records", str(out)])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["replicas"] == 2
    assert {"0", "1"} <= {line.split(",")[-1] for line in out.read_text().splitlines()}


def test_a_trace_of_a_fleet_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {"replicas": 2})
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", str(path), "--trace", str(tmp_path / "trace.json")])
    assert ended.value.code == 2
    assert "a trace shows one engine" in capsys.readouterr().err
