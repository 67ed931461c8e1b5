"""Policies beyond vLLM's own, for comparisons on the same traffic.

Each module holds one: a dataclass with its parameters, for `adapter_twin.twin.simulate.simulate`,
whose methods decide what `adapter_twin.twin.policy.Policy` would decide as vLLM does.
"""

from adapter_twin.twin.policies.cost_aware import CostAware
from adapter_twin.twin.policies.drain import Drain
from adapter_twin.twin.policies.merge import Merge
from adapter_twin.twin.policies.unified_pool import UnifiedPool
from adapter_twin.twin.policy import Policy

__all__ = ["CostAware", "Drain", "Merge", "Policy", "UnifiedPool"]
