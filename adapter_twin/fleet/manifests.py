"""Kubernetes manifests of a placement: a Deployment and a Service for each GPU, and the routes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from adapter_twin.fleet.kinds import on_kind
from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.commands import vllm_args
from adapter_twin.plan.demand import Demand
from adapter_twin.tables.datasets import write_text
from adapter_twin.workload.gpus import gpu_name

PORT = 8000
MODELS, ADAPTERS = "/models", "/adapters"
"""Volume claims of these names are mounted here: ``/models/<model>``, ``/adapters/<adapter>``."""

WEIGHTS_S = 600
"""Reading the weights may take as long, which the laws do not tell."""

SLOWER_START = 2
"""From weights to ready, a start may take this many times what is predicted."""

PROBED_EVERY_S = 10

PRODUCT = "nvidia.com/gpu.product"
"""NVIDIA's GPU feature discovery labels nodes so, with the driver's name of their GPUs."""


def write_manifests(folder: Path, demand: Demand, placement: Placement) -> list[Path]:
    """Write ``replica-<number>.yaml`` for every GPU, and ``routes.yaml``; return the files.

    They take the place of those of an earlier placement. The version of vLLM that is served with is
    that of the GPU's calibration.

    Parameters
    ----------
    folder : pathlib.Path
        Made where it is missing.
    demand : Demand
    placement : Placement
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [on_kind(demand, kind) for kind in demand.fleet.kinds]
    laws = [load_calibration(own.calibration, own.model) for own in kinds]
    names, texts = replica_names(placement), {}
    for name, plan in zip(names, placement.replicas, strict=True):
        documents = manifest(name, demand, plan, laws[plan.kind])
        texts[folder / f"{name}.yaml"] = _yaml(documents)
    texts[folder / "routes.yaml"] = _yaml([routes_manifest(routes(demand, placement))])
    for file, text in texts.items():
        write_text(file, text)
    for file in set(folder.glob("replica-*.yaml")).difference(texts):
        file.unlink()  # of an earlier placement: `kubectl apply -f` would start it as well
    return list(texts)


def _yaml(documents: list[dict[str, Any]]) -> str:
    text: str = yaml.safe_dump_all(documents, sort_keys=False, width=1000)
    return text


def replica_names(placement: Placement) -> list[str]:
    """Return the names of the GPUs' Deployments and Services."""
    count = len(placement.replicas)
    return [f"replica-{number:0{len(str(count - 1))}d}" for number in range(count)]


def routes(demand: Demand, placement: Placement) -> dict[str, dict[str, float]]:
    """Return where requests for each adapter go: Services by name, and the share of each."""
    table: dict[str, dict[str, float]] = {}
    for name, plan in zip(replica_names(placement), placement.replicas, strict=True):
        for adapter, share in zip(plan.adapters, plan.shares, strict=True):
            table.setdefault(demand.adapters[adapter].name, {})[name] = share
    return table


def routes_manifest(table: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return `routes` as JSON in a ConfigMap, for a router to mount."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "routes"},
        "data": {"routes.json": json.dumps(table, separators=(",", ":"))},
    }


def manifest(
    name: str, demand: Demand, plan: ReplicaPlan, calibration: Calibration
) -> list[dict[str, Any]]:
    """Return the Deployment and the Service of one GPU.

    Parameters
    ----------
    name : str
        Of both documents.
    demand : Demand
    plan : ReplicaPlan
    calibration : Calibration
    """

    def labels() -> dict[str, str]:  # a new one each time: YAML would refer to a shared one
        return {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": name}

    arguments = [
        *("--model", f"{MODELS}/{demand.model}"),
        *("--served-model-name", demand.model),
        *("--port", str(PORT)),
        *vllm_args(plan.engine, calibration),
        "--lora-modules",
        *(f"{own}={ADAPTERS}/{own}" for own in (demand.adapters[i].name for i in plan.adapters)),
    ]
    container = {
        "name": "vllm",
        "image": f"vllm/vllm-openai:v{calibration.memory.version}",
        "args": arguments,
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": {
            "httpGet": {"path": "/health", "port": "http"},
            "periodSeconds": PROBED_EVERY_S,
            "failureThreshold": _most_probes(demand, plan, calibration),
        },
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
    pod: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if len(demand.fleet.kinds) > 1:
        pod["nodeSelector"] = {PRODUCT: gpu_name(calibration.gpu).replace(" ", "-")}
    template = {"metadata": {"labels": labels()}, "spec": pod}
    deployed = {"replicas": 1, "selector": {"matchLabels": labels()}, "template": template}
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    served = {"selector": labels(), "ports": ports}
    return [
        {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, "labels": labels()},
            "spec": spec,
        }
        for version, kind, spec in (("apps/v1", "Deployment", deployed), ("v1", "Service", served))
    ]


def _most_probes(demand: Demand, plan: ReplicaPlan, calibration: Calibration) -> int:
    """Return how often a start may be looked at in vain before Kubernetes begins anew."""
    named = replace(plan.engine, lora_modules="all")
    start_s = calibration.startup_s(named, [demand.adapters[i] for i in plan.adapters])
    return math.ceil((WEIGHTS_S + SLOWER_START * start_s) / PROBED_EVERY_S)
