"""Kubernetes manifests of a placement: a Deployment and a Service for each GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.laws import Calibration
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.recommend import vllm_args
from adapter_twin.tables.datasets import replacing

PORT = 8000
MODELS, ADAPTERS = "/models", "/adapters"
"""Where volume claims of these names are mounted: ``/models/<model>``, ``/adapters/<adapter>``."""


def write_manifests(
    folder: Path, demand: Demand, placement: Placement, calibration: Calibration
) -> list[Path]:
    """Write ``replica-<number>.yaml`` for every GPU into a folder; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(placement.replicas) - 1))
    files = []
    for number, plan in enumerate(placement.replicas):
        name = f"replica-{number:0{digits}d}"
        documents = manifest(name, demand, plan, calibration.engine_version)
        with replacing(folder / f"{name}.yaml") as temporary:
            temporary.write_text(
                yaml.safe_dump_all(documents, sort_keys=False, width=1000), encoding="utf-8"
            )
        files.append(folder / f"{name}.yaml")
    return files


def manifest(
    name: str, demand: Demand, plan: ReplicaPlan, engine_version: str
) -> list[dict[str, Any]]:
    """Return the Deployment and the Service of one GPU."""

    def labels() -> dict[str, str]:  # a new one each time: YAML would refer to a shared one
        return {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": name}

    adapters = [demand.adapters[i].name for i in plan.adapters]
    arguments = [
        *("--model", f"{MODELS}/{demand.model}"),
        *("--served-model-name", demand.model),
        *("--port", str(PORT)),
        *vllm_args(plan.engine),
        "--lora-modules",
        *(f"{adapter}={ADAPTERS}/{adapter}" for adapter in adapters),
    ]
    container = {
        "name": "vllm",
        "image": f"vllm/vllm-openai:v{engine_version}",
        "args": arguments,
        "ports": [{"name": "http", "containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}},
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS, "readOnly": True},
            {"name": "adapters", "mountPath": ADAPTERS, "readOnly": True},
        ],
    }
    volumes = [
        {"name": claim, "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for claim in ("models", "adapters")
    ]
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels()},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels()},
                "template": {
                    "metadata": {"labels": labels()},
                    "spec": {"containers": [container], "volumes": volumes},
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels()},
            "spec": {
                "selector": labels(),
                "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
            },
        },
    ]
