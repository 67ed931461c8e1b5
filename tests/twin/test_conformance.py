"""The twin beside what vLLM's own schedulers decided, step by step (see `data/conformance/`).

The schedulers themselves run in `test_conformance_live.py`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest

from adapter_twin.errors import AdapterTwinError
from study.conformance import (
    FEATURES,
    FEATURES_RECORDED,
    FOLDER,
    KINDS,
    RESERVES_PROMPTS,
    Case,
    PlainCaches,
    batch_of,
    cache_steps,
    contended_case,
    first_difference,
    load,
    twin_steps,
)

ON: dict[str, Callable[[Case], bool]] = {
    **{name: lambda case, name=name: bool(getattr(case, name)) for name in FEATURES},
    "enable_chunked_prefill": lambda case: not case.enable_chunked_prefill,
}
"""Whether a feature is on in a case, by the field that tells."""


@cache
def recording(version: str) -> list[tuple[Case, list[Any]]]:
    return load(FOLDER / f"vllm-{version}.json.gz")


def difference(case: Case, rows: list[Any], reserves_prompts: bool) -> tuple[Any, Any] | None:
    ours = (step.row() for step in twin_steps(case, reserves_prompts=reserves_prompts))
    return first_difference(zip_longest(rows, ours))


@pytest.mark.parametrize("version", RESERVES_PROMPTS)
def test_every_step_is_the_one_that_vllm_took(version: str) -> None:
    for case, rows in recording(version):
        assert difference(case, rows, RESERVES_PROMPTS[version]) is None, case


@pytest.mark.parametrize("version", RESERVES_PROMPTS)
def test_a_recording_holds_every_kind_of_decision(version: str) -> None:
    cases, rows = zip(*recording(version), strict=True)
    steps = [step for steps in rows for step in steps]
    assert len(steps) > 19_000
    assert set(Counter(case.kind for case in cases).values()) == {len(cases) // len(KINDS)}
    assert {case.block_size for case in cases} == {1, 4, 16}
    base_model = {adapter < 0 for case in cases for _, adapter, _, _ in case.requests}
    assert base_model == {False, True}
    waiting, told, preempted = ([step[i] for step in steps] for i in (3, 6, 7))
    assert np.count_nonzero(waiting) > 5_000
    assert sum(map(len, preempted)) > 400
    assert max(map(len, preempted)) > 1
    assert sum(map(len, told)) > 1.2 * sum(len(case.requests) for case in cases)  # in chunks, again


def test_every_step_with_features_is_the_one_that_vllm_took() -> None:
    for case, rows in recording(FEATURES_RECORDED):
        assert difference(case, rows, True) is None, case


def test_the_recording_with_features_holds_each_of_them_and_all_together() -> None:
    steps = Counter[str]()
    for case, rows in recording(FEATURES_RECORDED):
        on = [name for name, is_on in ON.items() if is_on(case)]
        steps.update({name: len(rows) for name in on})
        steps[f"{len(on)} at once"] += len(rows)
    assert min(steps[name] for name in ON) > 5_000
    assert min(steps[f"{n} at once"] for n in range(1, 1 + len(ON))) > 50
    preempted = sum(len(row[7]) for _, rows in recording(FEATURES_RECORDED) for row in rows)
    assert preempted > 500


@pytest.mark.parametrize("feature", FEATURES)
def test_an_engine_without_a_feature_takes_other_steps(feature: str) -> None:
    plain = next(field.default for field in fields(Case) if field.name == feature)
    off = [] if feature == "priorities" else plain
    differ = [
        difference(replace(case, **{feature: off}), rows, True) is not None
        for case, rows in recording(FEATURES_RECORDED)
        if ON[feature](case)
    ]
    assert sum(differ) > len(differ) / 4


@pytest.mark.parametrize("version", RESERVES_PROMPTS)
def test_the_other_versions_rule_of_admission_takes_other_steps(version: str) -> None:
    other = not RESERVES_PROMPTS[version]
    mixed = [(case, rows) for case, rows in recording(version) if case.kind == "mixed"]
    assert sum(difference(case, rows, other) is not None for case, rows in mixed) > len(mixed) / 2


@pytest.mark.parametrize(
    "limit", ["max_loras", "max_num_seqs", "max_num_batched_tokens", "kv_blocks"]
)
def test_an_engine_with_one_more_of_anything_takes_other_steps(limit: str) -> None:
    caught = sum(
        difference(replace(case, **{limit: getattr(case, limit) + 1}), rows, True) is not None
        for case, rows in recording("0.32.0")[:30]
    )
    assert caught >= 5


SIZES = pytest.mark.parametrize("slots", [2, 8, 32, 64])


@SIZES
@pytest.mark.parametrize("spare", [0, 4])
def test_caches_hold_what_vllms_rule_leaves_in_them(slots: int, spare: int) -> None:
    rng = np.random.default_rng(slots)
    for _ in range(4):
        case = contended_case(rng, slots)
        places = rng.permutation(case.adapters)
        session = case.session(max_cpu_loras=slots + spare, timed=True, places=places)
        caches = PlainCaches(slots, slots + spare)
        assert first_difference(cache_steps(session, caches)) is None
        steps = session.steps[: session.clock["steps"]]
        assert np.mean(steps.adapters == slots) > 0.4
        assert steps.loads.mean() > 0.25 * slots


@SIZES
def test_pinned_adapters_are_passed_over(slots: int) -> None:
    rng = np.random.default_rng(slots)
    case = contended_case(rng, slots, seqs=slots // 2)
    pinned = np.arange(case.adapters) % 6 == 1  # as many as half of the slots
    session = case.session(
        max_cpu_loras=slots, timed=True, places=rng.permutation(case.adapters), pinned=pinned
    )
    caches = PlainCaches(slots, slots, np.flatnonzero(pinned))
    assert first_difference(cache_steps(session, caches)) is None
    assert session.steps.loads.sum() > 100


@SIZES
def test_the_order_within_a_step_decides_what_is_copied(slots: int) -> None:
    class Backwards(PlainCaches):
        def touch(self, batch: list[int]) -> tuple[int, int]:
            return super().touch(batch[::-1])

    session = contended_case(np.random.default_rng(slots), slots).session(timed=True)
    assert first_difference(cache_steps(session, Backwards(slots, 3 * slots))) is not None


def test_the_twin_stops_where_pinned_adapters_leave_too_few_slots() -> None:
    case = contended_case(np.random.default_rng(0), 4)
    session = case.session(timed=True, pinned=np.arange(case.adapters) < 2)
    caches = PlainCaches(4, case.adapters, range(2))
    with pytest.raises(AdapterTwinError, match="pinned: "):
        assert first_difference(cache_steps(session, caches)) is None
    caches.touch(batch := batch_of(session))
    assert not set(batch) <= caches.contents()[0]  # one has driven out another
