"""The designed experiment of a micro-profile: the batches that the engine is made to run."""

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

from adapter_twin.errors import require
from adapter_twin.measure.engine_flags import EngineFlags
from adapter_twin.workload.strict import Count, Many, Some, Whole, dataclass

WARM_UP_STEPS = 2
"""Once a point's batch is complete, n steps are run and thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroPlan:
    """The levels of each factor; levels an engine cannot run are left out for that engine.

    Attributes
    ----------
    running : tuple of int
        Running requests.
    context_tokens : tuple of int
        Tokens that each of them holds when it is measured.
    adapters : tuple of int
        Distinct adapters among them; 0 is the base model.
    ranks : tuple of int
        Rank of the adapters of a batch.
    chunk_tokens : tuple of int
        Prompt tokens, in prefill alone and beside running decodes.
    waiting : tuple of int
        Requests that wait because their adapter has no slot.
    repeats : int
        Times that every point is measured, each time in another random order.
    steps : int
        Steps measured per point and repeat.
    loads : int
        Adapter loads measured per rank, from disk and from host memory each.
    """

    running: Some[Count]
    context_tokens: Some[Count]
    adapters: Some[Whole]
    ranks: Some[Count]
    chunk_tokens: Many[Count]
    waiting: Many[Count] = (16, 64, 256)
    repeats: Count = 3
    steps: Count = 8
    loads: Whole = 3


class Point(NamedTuple):
    """One batch of the experiment.

    Attributes
    ----------
    running, context_tokens : int
        Decoding requests, and the tokens each of them holds.
    adapters, rank : int
        Distinct adapters among them and their rank; both 0 for the base model.
    chunk_tokens : int
        Prompt that joins the decodes, one after another; 0 for none.
    waiting : int
        Requests of a further adapter, for which no slot is free.
    """

    running: int
    context_tokens: int
    adapters: int
    rank: int
    chunk_tokens: int = 0
    waiting: int = 0

    def longest_tokens(self, steps: int) -> int:
        """Return the tokens that the point's longest request reaches."""
        # While a batch's last prompts are in prefill its first requests decode already.
        grown = self.context_tokens + self.running + WARM_UP_STEPS + 2 * steps
        return max(grown if self.running else 0, self.chunk_tokens + 1)

    def kv_tokens(self, steps: int, block_size: int) -> int:
        """Return an upper bound on the KV tokens that the point's requests hold together."""
        blocks = -(-self.longest_tokens(steps) // block_size)
        return (self.running + 1) * blocks * block_size


def design(
    plan: MicroPlan,
    flags: EngineFlags,
    adapters_per_rank: Mapping[int, int],
    kv_tokens: int,
    block_size: int,
) -> list[Point]:
    """Return the points of a plan that an engine can run.

    Running requests x distinct adapters x rank is a full factorial at the shortest context. The
    context is crossed with the running requests alone, at the fewest adapters: attention knows no
    adapter. Prompts are crossed with the running requests (none to many) and the rank.

    Parameters
    ----------
    plan : MicroPlan
    flags : EngineFlags
    adapters_per_rank : mapping of int to int
        Number of adapters of each rank.
    kv_tokens, block_size : int
        Size of the engine's KV cache and of one of its blocks, in tokens.
    """
    mixes = _mixes(plan, flags)
    points = _decodes(plan, mixes) + _prompts(plan, mixes) + _gated(plan, flags, adapters_per_rank)
    return [
        point
        for point in dict.fromkeys(points)
        if point.running + bool(point.chunk_tokens) <= flags.max_num_seqs
        and point.longest_tokens(plan.steps) <= flags.max_model_len
        and point.kv_tokens(plan.steps, block_size) <= kv_tokens
    ]


def check_plan(plan: MicroPlan, flags: EngineFlags, adapters_per_rank: Mapping[int, int]) -> None:
    """Check that an engine can run some of a plan's batches, with the adapters there are.

    Parameters
    ----------
    plan : MicroPlan
    flags : EngineFlags
    adapters_per_rank : mapping of int to int

    Raises
    ------
    AdapterTwinError
        The plan asks for more adapters of a rank than there are, or for none that fits.
    """
    mixes = _mixes(plan, flags)
    require(
        bool(mixes),
        f"adapters: no level fits max_loras = {flags.max_loras} and max_lora_rank = "
        f"{flags.max_lora_rank}; add 0, the base model",
    )
    for count, rank in mixes:
        have = adapters_per_rank.get(rank, 0)
        require(
            count <= have,
            f"adapters: the plan has {count} distinct adapters of rank {rank} in a batch, and "
            f"{have} are there; add adapters or lower the levels",
        )


def _mixes(plan: MicroPlan, flags: EngineFlags) -> list[tuple[int, int]]:
    """Return the (distinct adapters, rank) that fit the slots; (0, 0) is the base model."""
    ranks = [rank for rank in plan.ranks if rank <= flags.max_lora_rank]
    mixes = [(0, 0)] if 0 in plan.adapters or not flags.max_loras else []
    mixes += [(k, rank) for k, rank in product(plan.adapters, ranks) if 0 < k <= flags.max_loras]
    return mixes


def _decodes(plan: MicroPlan, mixes: list[tuple[int, int]]) -> list[Point]:
    shortest, fewest = min(plan.context_tokens), min(mixes)
    return [
        Point(running, context, *mix)
        for running, context, mix in product(plan.running, plan.context_tokens, mixes)
        if mix[0] <= running and (context == shortest or mix == fewest)
    ]


def _prompts(plan: MicroPlan, mixes: list[tuple[int, int]]) -> list[Point]:
    points = []
    for running, (count, rank) in product((0, *plan.running), mixes):
        # Alone, a prompt has one adapter; beside decodes, it meets as many as they can have.
        fitting = (k for k, of_rank in mixes if of_rank == rank and k <= max(running, 1))
        if count == max(fitting, default=None):
            decodes = Point(running, min(plan.context_tokens), count, rank)
            points += [decodes._replace(chunk_tokens=chunk) for chunk in plan.chunk_tokens]
    return points


def _gated(
    plan: MicroPlan, flags: EngineFlags, adapters_per_rank: Mapping[int, int]
) -> list[Point]:
    slots = flags.max_loras
    # One adapter more than slots is needed, so that a request has to wait for its slot.
    rank = next((rank for rank, have in sorted(adapters_per_rank.items()) if have > slots), None)
    if not slots or rank is None or rank > flags.max_lora_rank:
        return []
    full = Point(slots, min(plan.context_tokens), slots, rank)
    return [full._replace(waiting=waiting) for waiting in plan.waiting]
