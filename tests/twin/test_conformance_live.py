"""The twin beside vLLM's own classes, step by step: its scheduler, and its caches of adapters."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice, zip_longest
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.workload.adapters import deal_adapters
from adapter_twin.workload.trace import generate
from adapter_twin.workload.traffic import Lengths, Sessions, Workload
from study.ch16_chain import exchange, full_batches
from study.conformance import (
    FEATURES,
    FOLDER,
    Caches,
    Case,
    batch_of,
    cache_steps,
    contended_case,
    feature_cases,
    first_difference,
    load,
    random_cases,
    twin_steps,
)
from tests.twin.record_conformance import (
    Installed,
    engine_steps,
    lora_request,
    record,
    recorded_cases,
    recorded_feature_cases,
)

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Installed]:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("tiny")
    return lambda **scheduling: Installed(folder, **scheduling)


@pytest.mark.parametrize(
    ("scheduling", "reserves_prompts", "cases"),
    [({}, True, 240), ({"scheduler_reserve_full_isl": False}, False, 60)],
    ids=["default", "first-chunk"],
)
def test_every_step_is_the_one_that_the_scheduler_takes(
    engine: Callable[..., Installed],
    scheduling: dict[str, bool],
    reserves_prompts: bool,
    cases: int,
) -> None:
    vllm = engine(**scheduling)
    steps = 0
    for case in random_cases(1, cases):
        theirs = list(engine_steps(vllm, case))
        ours = twin_steps(case, reserves_prompts=reserves_prompts)
        assert first_difference(zip_longest(theirs, ours)) is None, case
        steps += len(theirs)
    assert steps > 100 * cases


@pytest.mark.parametrize("feature", [None, *FEATURES])
def test_every_step_with_features_is_the_one_that_the_scheduler_takes(
    engine: Callable[..., Installed], feature: str | None
) -> None:
    vllm, steps, n = engine(), 0, 40 if feature else 150
    for case in feature_cases(2, n, *([feature] if feature else [])):
        theirs = list(engine_steps(vllm, case))
        ours = twin_steps(case, reserves_prompts=True)
        assert first_difference(zip_longest(theirs, ours)) is None, case
        steps += len(theirs)
    assert steps > 90 * n


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("samples", [1, 3], ids=["sessions", "samples"])
def test_every_step_of_traffic_with_shared_prompts_is_the_one_that_the_scheduler_takes(
    engine: Callable[..., Installed], samples: int, ahead: bool
) -> None:
    vllm, found = engine(), 0
    for seed in range(12):
        case = replace(shared_case(seed, samples), async_scheduling=ahead)
        theirs = list(engine_steps(vllm, case))
        ours = twin_steps(case, reserves_prompts=True)
        assert first_difference(zip_longest(theirs, ours)) is None, case
        computed = sum(sum(step.batch.values()) for step in theirs)
        found += sum(prompt + output - 1 for *_, prompt, output in case.requests) - computed
    assert found > 1000 * (1 + (samples == 1))  # tokens that the cache held, but for preemptions


def shared_case(seed: int, samples: int) -> Case:
    """Return requests of sessions, as they came to the twin, or of several samples."""
    rng = np.random.default_rng(seed)
    lengths = Lengths(distribution="lognormal", mean_input_tokens=12, mean_output_tokens=9)
    workload = Workload(
        adapters=deal_adapters(3, [0.08], [8]),
        duration_s=60,
        lengths=replace(lengths, shared_prefix_tokens=6 * (seed % 2)),
        sessions=None if samples > 1 else Sessions(turns=4, distribution="geometric"),
        samples=samples,
    )
    trace = generate(workload, rng)
    trace = replace(trace, arrival_s=np.floor(trace.arrival_s))
    if trace.think_s is not None:
        trace = replace(trace, think_s=rng.integers(0, 20, len(trace)).astype(float))
    flags: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 48, "block_size": 4}
    longest = int((trace.prompt_tokens + trace.output_tokens).max())
    columns = np.column_stack((trace.adapter, trace.prompt_tokens, trace.output_tokens))
    case = Case(
        **flags,
        max_loras=2,
        kv_blocks=-(-longest // 4) + int(rng.integers(0, 60)),
        requests=np.insert(columns, 0, trace.arrival_s, axis=1).tolist(),
        kind="shared",
        enable_prefix_caching=True,
    )
    session = case.session(trace=trace, reserves_prompts=True)
    session.front_end = session.front_end._replace(duration_s=1e6)
    session.run()
    order = np.arange(len(trace)) if samples > 1 else session.closed_loop.sent
    contents = trace.contents
    assert contents is not None
    own = [slice(*contents.first[i : i + 2]) for i in order]
    return replace(
        case,
        requests=np.insert(columns[order], 0, session.requests.arrival_s, axis=1).tolist(),
        pieces=[np.column_stack((contents.piece[s], contents.end[s])).tolist() for s in own],
    )


@pytest.mark.parametrize(
    ("recording", "cases"),
    [("0.32.0", recorded_cases), ("0.32.0-features", recorded_feature_cases)],
)
def test_the_recording_of_this_version_is_what_it_decides(
    engine: Callable[..., Installed], recording: str, cases: Callable[[], list[Case]]
) -> None:
    assert record(engine(), cases()) == load(FOLDER / f"vllm-{recording}.json.gz")


@pytest.fixture(scope="module")
def vllm_caches() -> Callable[..., Caches]:
    """vLLM's managers of adapters, without weights."""
    pytest.importorskip("vllm")
    from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    class Manager(LRUCacheLoRAModelManager):
        def __init__(self, max_loras: int, max_cpu_loras: int) -> None:
            self.lora_config = SimpleNamespace(max_loras=max_loras, max_cpu_loras=max_cpu_loras)
            self._registered_adapters = AdapterLRUCache(max_cpu_loras, self.deactivate_adapter)
            self._active_adapters = AdapterLRUCache(max_loras, self._deactivate_adapter)
            self.lora_index_to_id = [None] * max_loras
            self.modules: dict[str, Any] = {}
            self.copies = 0

        def _add_adapter(self, lora: Any) -> None:
            self._registered_adapters[lora.id] = lora

        def activate_adapter(self, lora_id: int) -> bool:
            copied = super().activate_adapter(lora_id)
            self.copies += copied
            return copied

    class Worker(LRUCacheWorkerLoRAManager):
        def __init__(self, *sizes: int, pinned: Iterable[int] = ()) -> None:
            self._adapter_manager = Manager(*sizes)
            self.reads = 0
            for adapter in pinned:
                self.add_adapter(lora_request(adapter))
                self.pin_adapter(lora_request(adapter).lora_int_id)

        def _load_adapter(self, request: Any) -> Any:
            self.reads += 1
            return SimpleNamespace(id=request.lora_int_id)

        def touch(self, batch: list[int]) -> tuple[int, int]:
            manager = self._adapter_manager
            before = manager.copies, self.reads
            self.set_active_adapters([lora_request(adapter) for adapter in batch], None)
            return manager.copies - before[0], self.reads - before[1]

        def contents(self) -> tuple[set[int], set[int]]:
            manager = self._adapter_manager
            slots = {number - 1 for number in manager.lora_index_to_id if number is not None}
            assert slots == {number - 1 for number in manager._active_adapters}
            return slots, {number - 1 for number in self.list_adapters()}

    return Worker


SIZES = pytest.mark.parametrize("slots", [2, 8, 32])


@SIZES
@pytest.mark.parametrize("spare", [0, 4])
def test_slots_and_host_memory_hold_what_vllm_holds_there(
    vllm_caches: Callable[..., Caches], slots: int, spare: int
) -> None:
    rng = np.random.default_rng(slots)
    for _ in range(4):
        case = contended_case(rng, slots)
        places = rng.permutation(case.adapters)
        session = case.session(max_cpu_loras=slots + spare, timed=True, places=places)
        assert first_difference(cache_steps(session, vllm_caches(slots, slots + spare))) is None
        assert session.steps.loads.sum() > 50


@SIZES
def test_pinned_adapters_are_passed_over(vllm_caches: Callable[..., Caches], slots: int) -> None:
    rng = np.random.default_rng(slots)
    case = contended_case(rng, slots, seqs=slots // 2)
    pinned = np.arange(case.adapters) % 6 == 1  # as many as half of the slots
    session = case.session(
        max_cpu_loras=slots, timed=True, places=rng.permutation(case.adapters), pinned=pinned
    )
    caches = vllm_caches(slots, slots, pinned=np.flatnonzero(pinned).tolist())
    assert first_difference(cache_steps(session, caches)) is None
    assert session.steps.loads.sum() > 100


@pytest.mark.parametrize(("slots", "pinned"), [(2, 0), (8, 0), (32, 0), (32, 16)])
def test_an_exchange_costs_vllm_what_the_chapter_on_the_chain_says(
    vllm_caches: Callable[..., Caches], slots: int, pinned: int
) -> None:
    caches = vllm_caches(slots, 3 * slots, pinned=range(pinned))
    batches = [batch for _, batch in islice(full_batches(slots, pinned), 301)]
    counts = np.array([caches.touch(batch) for batch in batches])[1:]
    assert counts.mean(axis=0).tolist() == list(exchange(slots, steps=300, pinned=pinned))


@pytest.mark.parametrize("spare", [0, 4])
def test_where_all_slots_are_pinned_both_stop_at_the_same_step(
    vllm_caches: Callable[..., Caches], spare: int
) -> None:
    case = contended_case(np.random.default_rng(0), 4, seqs=1)
    pinned = np.arange(case.adapters) < 4
    session = case.session(max_cpu_loras=4 + spare, timed=True, pinned=pinned)
    caches = vllm_caches(4, 4 + spare, pinned=range(4))
    with pytest.raises(AdapterTwinError, match="pinned: "):
        assert first_difference(cache_steps(session, caches)) is None
    with pytest.raises(RuntimeError, match="All items are pinned"):
        caches.touch(batch_of(session))


def test_where_pins_leave_too_few_slots_the_twin_stops_before_vllm_looks_for_a_lost_adapter(
    vllm_caches: Callable[..., Caches],
) -> None:
    case = contended_case(np.random.default_rng(0), 4)
    session = case.session(timed=True, pinned=np.arange(case.adapters) < 2)
    caches = vllm_caches(4, case.adapters, pinned=range(2))
    with pytest.raises(AdapterTwinError, match="pinned: "):
        assert first_difference(cache_steps(session, caches)) is None
    caches.touch(batch := batch_of(session))
    assert not set(batch) <= caches.contents()[0]  # its mapping to slots would then raise
