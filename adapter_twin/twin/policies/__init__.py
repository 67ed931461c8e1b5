"""Policies beyond vLLM's own, for comparisons on the same traffic.

Each module holds one: a dataclass with its parameters, for `adapter_twin.twin.simulate.simulate`,
and the compiled functions that decide. They are called from the few points where policies differ:
the start of a step (`adapter_twin.twin.scheduler.schedule`), who is admitted next (``queues``), who
is evicted and what memory an adapter takes (``residency``), and what a step costs (``step_law``).
"""

from adapter_twin.twin.policies.cost_aware import CostAware
from adapter_twin.twin.policies.drain import Drain
from adapter_twin.twin.policies.merge import Merge
from adapter_twin.twin.policies.unified_pool import UnifiedPool

Policy = Drain | CostAware | UnifiedPool | Merge

__all__ = ["CostAware", "Drain", "Merge", "Policy", "UnifiedPool"]
