"""The twin held to vLLM's own decisions, step by step.

``data/conformance/`` holds what vLLM's schedulers decided on random cases; its README tells how it
was recorded. Here are the cases, the decisions of one step, and the twin's decisions, read from
its arrays between two turns. Tests compare them with the recordings and with an installed vLLM.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from adapter_twin.tables import datasets
from adapter_twin.twin.block_scheduler import BY_BLOCK
from adapter_twin.twin.clock import FrontEnd, StepLaw
from adapter_twin.twin.layout import new_session
from adapter_twin.twin.session import Session
from adapter_twin.workload.engine_config import EngineConfig
from adapter_twin.workload.trace import Contents, Trace
from study.ch16_chain import AdapterCaches

if TYPE_CHECKING:
    import pandas as pd

FOLDER = datasets.REPOSITORY / "data" / "conformance"
KINDS = ("slots", "kv", "budget", "seqs", "mixed", "loose")
RESERVES_PROMPTS = {"0.8.5": False, "0.32.0": True}
"""True: a recorded version admits a prompt only when KV blocks for all of it are free."""

FEATURES_RECORDED = "0.32.0-features"
"""The recording of cases with `FEATURES`, whole prompts reserved."""

NULL_BLOCK = 1  # that vLLM keeps to itself
ONE_SECOND = StepLaw(np.empty(0), np.eye(1, 8), 0.0, np.zeros(3))
NO_FRONT_END = FrontEnd(np.inf, 1 << 40)
LOAD_S, READ_S = 2.0**-6, 2.0**-12  # a sum of both, as the twin rounds it, tells how many of each


@dataclass(frozen=True)
class Case:
    """An engine and its requests: (step of arrival, adapter or -1, prompt, output tokens)."""

    max_loras: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_blocks: int
    requests: list[tuple[int, int, int, int]]
    kind: str
    enable_prefix_caching: bool = False
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    async_scheduling: bool = False
    priorities: list[int] = field(default_factory=list)
    """Of the adapters, where there are any: of all up to the highest one asked for."""
    pieces: list[list[tuple[int, int]]] = field(default_factory=list)
    """What each request begins with, where prefixes are cached: numbers and ends of its pieces."""

    @property
    def adapters(self) -> int:
        """Number of adapters, up to the highest one asked for."""
        return 1 + max(0, *(adapter for _, adapter, _, _ in self.requests))

    @property
    def trace(self) -> Trace:
        """Its requests, which arrive at the seconds of their steps."""
        columns = (np.array(column, np.int32) for column in zip(*self.requests, strict=True))
        arrival, adapter, prompt, output = columns
        return Trace(arrival.astype(float), adapter, prompt, output, self._contents())

    def session(
        self,
        *,
        max_cpu_loras: int | None = None,
        timed: bool = False,
        trace: Trace | None = None,
        **how: Any,
    ) -> Session:
        """Lay out the twin's run; `timed`: copies and reads of adapters take their time."""
        engine = EngineConfig(
            model="any",
            max_loras=self.max_loras,
            max_cpu_loras=max_cpu_loras or max(self.max_loras, self.adapters),
            max_lora_rank=8,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            scheduling_policy="priority" if self.priorities else "fcfs",
            async_scheduling=self.async_scheduling,
        )
        if self.priorities:
            how["priorities"] = np.array(self.priorities)
        return new_session(
            trace or self.trace,
            engine,
            ONE_SECOND,
            NO_FRONT_END,
            (self.kv_blocks + NULL_BLOCK) * self.block_size,
            np.full(self.adapters, timed * LOAD_S),
            np.full(self.adapters, timed * READ_S),
            **how,
        )

    def _contents(self) -> Contents | None:
        if not self.pieces:
            return None
        counts = [len(pieces) for pieces in self.pieces]
        flat = np.array([piece for pieces in self.pieces for piece in pieces]).reshape(-1, 2)
        first = np.concatenate(([0], np.cumsum(counts)))
        return Contents(first, flat[:, 0], flat[:, 1].astype(np.int32))

    def token(self, request: int, place: int) -> int:
        """Return the token of a request at a place of its sequence."""
        for piece, end in self.pieces[request] if self.pieces else []:
            if place < end:
                return 1 + 10_000 * piece + place
        return 10_000_000 * (request + 1) + place


class Step(NamedTuple):
    """What a scheduler decided in one step."""

    step: int
    batch: dict[int, int]  # tokens of each request in the step that begins
    # tokens of each request in the batch chosen last, which with asynchronous scheduling is that of
    # the step after it; in the order of the running list
    running: dict[int, int]
    waiting: list[int]  # in the order of the queue
    free_blocks: int
    adapters: int
    admitted: list[int]
    preempted: list[int]  # in the order in which they were
    finished: list[int]

    def row(self) -> list[Any]:
        """Return what a recording holds of it."""
        step, batch, running, waiting, free_blocks, adapters, admitted, preempted, finished = self
        told = [[r, tokens] for r, tokens in running.items() if tokens != 1 or r in admitted]
        counts = sum(batch.values()), len(running), len(waiting), free_blocks, adapters
        return [step, *counts, told, preempted, finished]


def random_case(rng: np.random.Generator, kind: str) -> Case:
    """Draw an engine that lacks what `kind` says ("mixed": everything), and its requests."""

    def lacks(what: str) -> bool:
        return kind in (what, "mixed")

    adapters, n = int(rng.integers(1, 11)), int(rng.choice([8, 20, 40]))
    block_size = int(rng.choice([1, 4, 16]))
    longest_prompt, longest_output = {1: (24, 16), 4: (40, 40), 16: (180, 120)}[block_size]
    prompt = rng.integers(1, rng.integers(8, longest_prompt), n, endpoint=True)
    output = rng.integers(1, rng.integers(4, longest_output), n, endpoint=True)
    arrival = np.sort(rng.integers(0, rng.choice([1, 10, 60, 240]), n))
    adapter = rng.integers(0, adapters, n)
    adapter[rng.random(n) < rng.choice([0, 0.2, 0.5])] = -1
    seqs = int(rng.integers(3, 7) if lacks("seqs") else rng.choice([16, 32, 64]))
    spare_tokens = rng.integers(1, 1 + longest_prompt // 5) if lacks("budget") else 40 * block_size
    one_request = -(-max(prompt + output) // block_size)
    short_kv = lacks("kv") or (kind == "budget" and rng.random() < 0.5)
    spare_blocks = rng.integers(0, one_request) if short_kv else 50 * one_request
    return Case(
        max_loras=int(rng.integers(1, 1 + max(1, adapters // 2))) if lacks("slots") else adapters,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + int(spare_tokens),
        block_size=block_size,
        kv_blocks=int(one_request + spare_blocks),
        requests=np.column_stack((arrival, adapter, prompt, output)).tolist(),
        kind=kind,
    )


def random_cases(seed: int, n: int) -> list[Case]:
    """Draw cases, as many of each kind."""
    rng = np.random.default_rng(seed)
    return [random_case(rng, KINDS[i % len(KINDS)]) for i in range(n)]


def feature_cases(seed: int, n: int, *features: str) -> list[Case]:
    """Draw cases in which some of what an engine can do is on.

    Parameters
    ----------
    seed : int
    n : int
    *features : str
        Of these, named as the fields of `Case`, each case draws some; left out, of all.
    """
    rng = np.random.default_rng(seed)
    cases = (random_case(rng, KINDS[i % len(KINDS)]) for i in range(n))
    return [_with_features(rng, case, features or tuple(FEATURES)) for case in cases]


def _with_features(rng: np.random.Generator, case: Case, features: tuple[str, ...]) -> Case:
    chosen = [name for name in features if rng.random() < 0.5] or [str(rng.choice(features))]
    for name in chosen:
        case = replace(case, **FEATURES[name](rng, case))
    return case


def _shared_prefixes(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    """Let requests begin with paths down a tree of a few pieces, some as long as all of them."""
    longest = max(prompt + output for _, _, prompt, output in case.requests)
    lengths = rng.integers(1, max(2, longest // int(rng.integers(1, 6))), (4, 3))
    deepest = int(rng.integers(1, 5))
    pieces = []
    for _ in case.requests:
        path = rng.integers(0, 3, rng.integers(0, deepest, endpoint=True)) // rng.integers(1, 3)
        ends = np.cumsum([lengths[depth, piece] for depth, piece in enumerate(path)])
        pieces.append(np.column_stack((path, ends.astype(int))).astype(int).tolist())
    return {"enable_prefix_caching": True, "pieces": pieces}


def _whole_prompts(rng: np.random.Generator, case: Case) -> dict[str, Any]:
    longest = max(prompt + output for _, _, prompt, output in case.requests)
    budget = max(case.max_num_seqs, longest + int(rng.integers(0, 1 + longest // 4)))
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": budget}


FEATURES: dict[str, Callable[[np.random.Generator, Case], dict[str, Any]]] = {
    "enable_prefix_caching": _shared_prefixes,
    "enable_chunked_prefill": _whole_prompts,
    "long_prefill_token_threshold": lambda rng, case: {
        "long_prefill_token_threshold": min(
            int(rng.integers(1, 1 + 3 * case.block_size)),
            case.max_num_batched_tokens,  # vLLM takes no more where prompts are not chunked
        )
    },
    "priorities": lambda rng, case: {
        "priorities": rng.integers(-2, 3, case.adapters).tolist(),
    },
    "async_scheduling": lambda rng, case: {"async_scheduling": True},
}
"""How to draw what each feature adds to a case."""


def save(records: list[tuple[Case, list[list[Any]]]], path: Path) -> None:
    """Write cases and the rows of their steps."""
    content = [{"case": asdict(case), "steps": rows} for case, rows in records]
    text = json.dumps(content, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load(path: Path) -> list[tuple[Case, list[list[Any]]]]:
    """Read what `save` wrote."""
    content = json.loads(gzip.decompress(path.read_bytes()))
    return [(Case(**record["case"]), record["steps"]) for record in content]


def twin_steps(case: Case, **how: Any) -> Iterator[Step]:
    """Run the twin on a case and yield what it decides in every step."""
    session = case.session(**how)
    state, requests, clock = session.state, session.requests, session.clock
    count, step = state.count, None
    was_running: list[int] = []
    tokens, preemptions, ended = (
        values.copy() for values in (state.base_tokens, requests.preemptions, requests.end_s)
    )
    while True:
        event_s = session.turn()
        if step is not None:
            yield step._replace(finished=_changed(np.isnan(requests.end_s), np.isnan(ended)))
            step, ended = None, requests.end_s.copy()
        if event_s == np.inf:
            return
        if count["running"]:
            running = _running(session)
            if session.policy == BY_BLOCK:
                given = {r: int(state.blocks.progress[r]["tokens"]) for r in running}
                batch = _batch(session)
            else:
                batch = given = {
                    r: int(state.base_tokens[r] if r not in was_running else change or 1)
                    for r in running
                    for change in [state.base_tokens[r] - tokens[r]]
                }
            row = session.steps[clock["steps"]]
            assert row["tokens"] == sum(batch.values())
            waiting = _waiting(session)
            preempted = _changed(requests.preemptions, preemptions)
            step = Step(
                step=int(clock["now_s"]),
                batch=batch,
                running=given,
                waiting=waiting,
                free_blocks=int(row["free_blocks"]),
                adapters=int(row["adapters"]),
                admitted=[r for r in running if r not in was_running],
                preempted=[r for r in reversed(waiting) if r in preempted],
                finished=[],
            )
            was_running = running
            tokens, preemptions = state.base_tokens.copy(), requests.preemptions.copy()
        clock["now_s"] = event_s


def _changed(now: Any, before: Any) -> list[int]:
    return np.flatnonzero(now != before).tolist()


def _running(session: Session) -> list[int]:
    """Return the stack of running requests without its holes."""
    stack = session.state.stack[: session.state.count["stack_top"]]
    running = stack[session.state.stack_index[stack] == np.arange(len(stack))]
    return [int(request) for request in running]


def _batch(session: Session) -> dict[int, int]:
    """Return the tokens of each request in the step that runs."""
    row = session.state.count["ended"] % 2
    blocks = session.state.blocks
    members = blocks.members[row, : blocks.chosen[row]["requests"]]
    return dict(zip(members["request"].tolist(), members["tokens"].tolist(), strict=True))


def _waiting(session: Session) -> list[int]:
    """Return the requests in the adapters' lists, those first that go before the others."""
    n, following = len(session.requests.adapter), session.state.next.tolist()
    blocks, waiting = session.state.blocks, []
    for sentinel in range(n, n + session.limits.base_model + 1):
        request = following[sentinel]
        while request != sentinel:
            waiting.append((blocks.priority[sentinel - n] if blocks else 0, request))
            request = following[request]
    waiting.sort(key=lambda pair: (pair[0], session.state.order[pair[1]]))
    return [request for _, request in waiting]


def conformance_table() -> pd.DataFrame:
    """Run the twin on all recorded cases.

    Returns
    -------
    pandas.DataFrame
        A row per recording: ``scheduler``, ``cases, steps, preemptions``, steps in which somebody
        ``waits``, and steps that ``differ``; after one that does, the rest of its case counts too.
    """
    import pandas as pd

    rows = []
    for version, reserves_prompts in [*RESERVES_PROMPTS.items(), (FEATURES_RECORDED, True)]:
        recording = load(FOLDER / f"vllm-{version}.json.gz")
        differ = sum(
            len(steps) - _alike(steps, twin_steps(case, reserves_prompts=reserves_prompts))
            for case, steps in recording
        )
        all_steps = [step for _, steps in recording for step in steps]
        rows.append(
            {
                "scheduler": f"vLLM {version}".replace(
                    "-features", ", with prefix caching and more"
                ),
                "cases": len(recording),
                "steps": len(all_steps),
                "preemptions": sum(len(step[7]) for step in all_steps),
                "waits": sum(step[3] > 0 for step in all_steps),
                "differ": differ,
            }
        )
    return pd.DataFrame(rows)


def _alike(steps: list[list[Any]], ours: Iterator[Step]) -> int:
    """Return how many steps of a recording the twin takes before one differs."""
    pairs = zip(steps, ours, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1].row(), pairs))


def first_difference(pairs: Iterable[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """Return the first steps, of an engine and of the twin, that differ: no run goes on after."""
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


# The two caches of adapters


class Caches(Protocol):
    """Adapters in slots and in host memory."""

    def touch(self, batch: list[int]) -> tuple[int, int]:
        """Make a batch's adapters resident, in that order; return copies and reads."""

    def contents(self) -> tuple[set[int], set[int]]:
        """Return the adapters in slots, and those in host memory."""


class PlainCaches(AdapterCaches):
    """Those of the chapter on the chain of evictions."""

    def touch(self, batch: list[int]) -> tuple[int, int]:  # type: ignore[override]
        """Make a batch's adapters resident, in that order; return copies and reads."""
        copied, read = super().touch(batch)
        return len(copied), len(read)

    def contents(self) -> tuple[set[int], set[int]]:
        """Return the adapters in slots, and those in host memory."""
        return set(self.active), set(self.registered)


def contended_case(rng: np.random.Generator, slots: int, seqs: int | None = None) -> Case:
    """Draw short requests of three times as many adapters as slots: most steps exchange some."""
    n = 80 * slots
    columns = (
        np.sort(rng.integers(0, 150, n)),
        rng.permutation(n) % (3 * slots),
        rng.integers(1, 4, n, endpoint=True),
        rng.integers(1, 4, n, endpoint=True),
    )
    return Case(
        max_loras=slots,
        max_num_seqs=seqs or 2 * slots,
        max_num_batched_tokens=16 * slots,
        block_size=4,
        kv_blocks=2 * slots + 2,
        requests=np.column_stack(columns).tolist(),
        kind="contended",
    )


def batch_of(session: Session) -> list[int]:
    """Return the adapters of the current step in the order in which it touches them."""
    batch = session.state.active_list[: session.state.count["active"]]
    return [int(adapter) for adapter in batch[np.argsort(session.state.place[batch])]]


def cache_steps(session: Session, caches: Caches) -> Iterator[tuple[Any, Any]]:
    """Run the twin, give its batches to caches, and yield what each holds and has loaded."""
    state, clock = session.state, session.clock
    while (event_s := session.turn()) < np.inf:
        if state.count["running"]:
            row = session.steps[clock["steps"]]
            copies, reads = caches.touch(batch_of(session))
            load_s = np.float32(copies * LOAD_S + reads * READ_S)
            on_gpu, on_host = (np.flatnonzero(on) for on in (state.on_gpu[:-1], state.on_host))
            theirs = copies, load_s, *caches.contents()
            yield theirs, (row["loads"], row["load_s"], set(on_gpu), set(on_host))
        clock["now_s"] = event_s
