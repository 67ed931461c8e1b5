"""Policies beyond vLLM's own, for comparisons on the same traffic.

Each module holds one: a dataclass with its parameters, for `adapter_twin.twin.simulate.simulate`,
whose methods decide what `adapter_twin.twin.policy.Policy` would decide as vLLM does.
"""

from adapter_twin.twin.policies.cost_aware import CostAware
from adapter_twin.twin.policies.drain import Drain
from adapter_twin.twin.policies.merge import Merge
from adapter_twin.twin.policies.unified_pool import UnifiedPool
from adapter_twin.twin.policy import Policy
from adapter_twin.workload.named import make_named

__all__ = ["POLICIES", "CostAware", "Drain", "Merge", "Policy", "UnifiedPool", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    "vllm": Policy,
    "drain": Drain,
    "cost_aware": CostAware,
    "unified_pool": UnifiedPool,
    "merge": Merge,
}
"""Policies by the names that configurations use."""


def make_policy(given: object, path: str = "policy") -> Policy:
    """Make one of the `POLICIES`, or one of your own, by `adapter_twin.workload.named.make_named`.

    Examples
    --------
    >>> make_policy({"name": "drain", "max_wait_s": 5})
    Drain(max_wait_s=5.0, tolerance=1.2)
    """
    return make_named(given, POLICIES, Policy, path)
