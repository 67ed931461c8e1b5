"""The child process of a micro-profile: one engine, driven step by step.

``python -m adapter_twin.measure.micro_engine FOLDER`` reads ``FOLDER/spec.json`` and writes
``start.json``, ``micro_steps.jsonl`` and ``adapter_loads.jsonl`` there, rows as soon as they are
measured.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from adapter_twin.errors import one_line
from adapter_twin.measure.engine_flags import GIB, EngineFlags
from adapter_twin.measure.micro_plan import WARM_UP_STEPS, MicroPlan, Point, design
from adapter_twin.measure.model_folder import check_model
from adapter_twin.measure.recorder import Recorder, model_runner, worker_adapters
from adapter_twin.measure.vllm_cli import answer_version
from adapter_twin.workload.strict import read


@dataclass(slots=True)
class Laboratory:
    """One running engine with its adapters, made to run given batches.

    Attributes
    ----------
    engine : vllm.v1.engine.llm_engine.LLMEngine
    recorder : Recorder
    adapters : mapping of str to int
        Rank of each adapter by its folder; ``lora_int_id`` counts them from 1.
    vocabulary : int
    rng : numpy.random.Generator
        Draws the prompts.
    """

    engine: Any
    recorder: Recorder
    adapters: Mapping[str, int]
    vocabulary: int
    rng: np.random.Generator
    _numbers: Iterator[int] = field(default_factory=count, init=False)

    def measure(self, point: Point, steps: int) -> list[dict[str, Any]]:
        """Run a point once and return the rows of its steps.

        The steps that fill the batch are rows as well: prompts in prefill, beside decodes. Those of
        the warm-up are not.
        """
        recorder, first = self.recorder, len(self.recorder.steps)
        chosen = self._of_rank(point.rank)[: point.adapters]
        adapters = cycle(chosen or [None])
        requests = [
            self._add(point.context_tokens, adapter) for adapter in islice(adapters, point.running)
        ]
        while not self._all_decode(point.running):
            recorder.step()
        if point.waiting:
            other = next(index for index in self._of_rank(point.rank) if index not in chosen)
            requests += [self._add(point.context_tokens, other) for _ in range(point.waiting)]
        complete = len(recorder.steps)
        for _ in range(WARM_UP_STEPS if point.running else 0):
            recorder.step()
        del recorder.steps[complete:]
        for _ in range(steps):
            if point.chunk_tokens:
                prompt = self._add(point.chunk_tokens, next(iter(chosen), None), outputs=1)
                while prompt in self.scheduler.requests:
                    recorder.step()
            else:
                recorder.step()
        self.engine.abort_request(requests, internal=True)
        # The worker hears of ended requests with the next step, which has no tokens; where the
        # engine schedules ahead, a batch may still be under way.
        core = self.engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            recorder.step()
        return recorder.steps[first:]

    def measure_loads(self, repeats: int) -> None:
        """Load adapters of every rank from disk, and then from host memory into a slot."""
        manager = worker_adapters(self.engine)
        if manager is None:
            return
        for rank in sorted(set(self.adapters.values())):
            for adapter in islice(self._of_rank(rank), repeats):
                request = self._lora(adapter)
                self.engine.remove_lora(adapter)
                self.engine.add_lora(request)
                manager._adapter_manager.deactivate_adapter(adapter)
                self.engine.add_lora(request)

    @property
    def scheduler(self) -> Any:
        """Scheduler of the engine core."""
        return self.engine.engine_core.engine_core.scheduler

    def _all_decode(self, running: int) -> bool:
        """Tell whether the last step left `running` requests with their prompts computed."""
        decoding = [
            r for r in self.scheduler.running if r.num_computed_tokens >= r.num_prompt_tokens
        ]
        return len(decoding) == running

    def _of_rank(self, rank: int) -> list[int]:
        return [index for index, own in enumerate(self.adapters.values(), start=1) if own == rank]

    def _lora(self, adapter: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{adapter}", adapter, list(self.adapters)[adapter - 1])

    def _add(self, prompt_tokens: int, adapter: int | None, outputs: int | None = None) -> str:
        """Queue a request that generates until it is aborted, or a given number of tokens."""
        from vllm import SamplingParams

        room = self.engine.model_config.max_model_len - prompt_tokens
        request_id: str = self.engine.add_request(
            f"r{next(self._numbers)}",
            {"prompt_token_ids": self.rng.integers(self.vocabulary, size=prompt_tokens).tolist()},
            SamplingParams(max_tokens=outputs or room, temperature=0.0, ignore_eos=True),
            lora_request=None if adapter is None else self._lora(adapter),
        )
        return request_id


def _start_engine(model: str, flags: EngineFlags) -> tuple[Any, dict[str, Any]]:
    """Start an engine, and return it with what its start measured."""
    from vllm import EngineArgs, LLMEngine

    capture_s = _time_captures()
    begin = perf_counter()
    engine = LLMEngine.from_engine_args(EngineArgs(model=model, **flags.arguments()))
    startup_s = perf_counter() - begin
    cache = engine.vllm_config.cache_config
    weights, slots = _memory_bytes(model_runner(engine).model)
    return engine, {
        "kv_cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "block_size": cache.block_size,
        "weights_gib": weights / GIB,
        "slots_gib": slots / GIB,
        "startup_s": startup_s,
        "capture_s": sum(capture_s) if capture_s else None,
    }


def _memory_bytes(model: Any) -> tuple[int, int]:
    """Return the bytes of a model's weights and of its adapter slots."""

    def size(tensors: Iterable[Any]) -> int:
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    stacked = (
        tensor
        for module in model.modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
        for tensor in getattr(module, name, ())
    )
    return size(model.parameters()), size(stacked)


def _time_captures() -> list[float]:
    """Collect the seconds that CUDA-graph captures in this process take; none on a CPU."""
    import torch

    elapsed_s: list[float] = []
    if not torch.cuda.is_available():
        return elapsed_s
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstRunner

    def timed(capture: Callable[..., Any]) -> Callable[..., Any]:
        def capture_model(*args: Any, **kwargs: Any) -> Any:
            begin = perf_counter()
            try:
                return capture(*args, **kwargs)
            finally:
                elapsed_s.append(perf_counter() - begin)

        return capture_model

    for runner in (FirstRunner, SecondRunner):
        runner.capture_model = timed(runner.capture_model)
    return elapsed_s


def visits(points: int, repeats: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield (repeat, point): every repeat visits all points, in another random order.

    Parameters
    ----------
    points, repeats : int
    rng : numpy.random.Generator

    Examples
    --------
    >>> list(visits(3, 2, np.random.default_rng(1)))
    [(0, 0), (0, 1), (0, 2), (1, 2), (1, 0), (1, 1)]
    """
    for repeat in range(repeats):
        for point in rng.permutation(points).tolist():
            yield repeat, point


def run(folder: Path) -> None:
    """Do what ``spec.json`` in a folder says, and leave the results beside it."""
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    flags = read(EngineFlags, spec["flags"], "flags")
    plan, adapters = read(MicroPlan, spec["plan"], "plan"), spec["adapters"]
    started = folder / "start.json"
    try:
        engine, start = _start_engine(spec["model"], flags)
    except Exception as error:  # whatever the engine's reason, it is the result
        started.write_text(json.dumps({"server_failure": one_line(error)}), encoding="utf-8")
        return
    started.write_text(json.dumps(start), encoding="utf-8")
    cache = start["kv_cache_tokens"], start["block_size"]
    points = design(plan, flags, Counter(adapters.values()), *cache)
    rng = np.random.default_rng(spec["seed"])
    vocabulary = check_model(Path(spec["model"]))["vocab_size"]
    recorder = Recorder(engine, dict(enumerate(adapters.values(), start=1)))
    laboratory = Laboratory(engine, recorder, adapters, vocabulary, rng)
    # The first steps of an engine allocate, compile and load: one round is thrown away.
    for point in points[:: max(1, len(points) // 10)]:
        laboratory.measure(point, 1)
    recorder.steps.clear()
    recorder.loads.clear()
    laboratory.measure_loads(plan.loads)
    with (folder / "micro_steps.jsonl").open("w", encoding="utf-8") as rows:
        for repeat, number in visits(len(points), plan.repeats, rng):
            measured = laboratory.measure(points[number], plan.steps)
            for step, row in enumerate(measured):
                place = {"repeat": repeat, "point": number, "step": step}
                rows.write(json.dumps(place | row) + "\n")
            rows.flush()
            recorder.steps.clear()
    with (folder / "adapter_loads.jsonl").open("w", encoding="utf-8") as rows:
        rows.writelines(json.dumps(row) + "\n" for row in recorder.loads)


if __name__ == "__main__":
    # An engine in this process, where its steps can be recorded.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    answer_version()
    run(Path(sys.argv[1]))
