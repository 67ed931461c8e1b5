"""Kubernetes manifests of a placement: a Deployment and a Service for each GPU."""

from pathlib import Path
from typing import Any

import yaml

from adapter_twin.fleet.placement import Placement, ReplicaPlan
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.plan.commands import vllm_args
from adapter_twin.plan.demand import Demand
from adapter_twin.tables.datasets import write_text

PORT = 8000
MODELS, ADAPTERS = "/models", "/adapters"
"""Volume claims of these names are mounted here: ``/models/<model>``, ``/adapters/<adapter>``."""


def write_manifests(folder: Path, demand: Demand, placement: Placement) -> list[Path]:
    """Write ``replica-<number>.yaml`` for every GPU in place of all others; return the files.

    The version of vLLM that is served with is that of the demand's calibration.

    Parameters
    ----------
    folder : pathlib.Path
        Made where it is missing.
    demand : Demand
    placement : Placement
    """
    calibration = load_calibration(demand.calibration, demand.model)
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(placement.replicas) - 1))
    texts = {}
    for number, plan in enumerate(placement.replicas):
        name = f"replica-{number:0{digits}d}"
        documents = manifest(name, demand, plan, calibration)
        text = yaml.safe_dump_all(documents, sort_keys=False, width=1000)
        texts[folder / f"{name}.yaml"] = text
    for file, text in texts.items():
        write_text(file, text)
    for file in set(folder.glob("replica-*.yaml")).difference(texts):
        file.unlink()  # of an earlier placement: `kubectl apply -f` would start it as well
    return list(texts)


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
    pod = {"containers": [container], "volumes": volumes}
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
