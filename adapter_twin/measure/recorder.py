"""Steps and adapter loads of an engine, recorded from its scheduler's own output.

The recorder puts itself around four methods of one in-process engine; it infers nothing.
"""

from collections import deque
from collections.abc import Mapping
from time import perf_counter
from typing import Any


class Recorder:
    """Record the steps and the adapter loads of one engine.

    Parameters
    ----------
    engine : vllm.v1.engine.llm_engine.LLMEngine
        An engine whose core runs in this process.
    ranks : mapping of int to int
        Rank of every adapter by its ``lora_int_id``.

    Attributes
    ----------
    steps : list of dict
        One row per step with tokens in it, in the columns of the table ``micro_steps``.
    loads : list of dict
        One row per adapter made resident.

    Notes
    -----
    A step ends when `update_from_output` has returned: by then the sampled tokens are on the host,
    so the accelerator has finished and nothing needs to be synchronised. It starts when it is
    scheduled or, where the engine schedules ahead (asynchronous scheduling, the default on CUDA and
    never on CPU), when the step before it ended: the accelerator runs one after the other.
    """

    def __init__(self, engine: Any, ranks: Mapping[int, int]) -> None:
        self.steps: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []
        self._engine, self._core = engine, engine.engine_core.engine_core
        self._ranks = ranks
        self._scheduled: deque[dict[str, Any]] = deque()
        self._last_end = self._core_ms = 0.0
        self._loads_before_step = 0
        core, scheduler = self._core, self._core.scheduler
        self._step_fn, core.step_fn = core.step_fn, self._timed_step
        self._schedule, scheduler.schedule = scheduler.schedule, self._recorded_schedule
        self._update = scheduler.update_from_output
        scheduler.update_from_output = self._recorded_update
        self._manager: Any = worker_adapters(engine)
        if self._manager is not None:
            self._load, self._manager.add_adapter = self._manager.add_adapter, self._recorded_load

    def step(self) -> None:
        """Run the engine's step and record what it did."""
        ended, begin = len(self.steps), perf_counter()
        self._engine.step()
        output_ms = (perf_counter() - begin) * 1e3 - self._core_ms
        for row in self.steps[ended:]:
            row["output_ms"] = output_ms

    def _timed_step(self) -> Any:
        begin = perf_counter()
        result = self._step_fn()
        self._core_ms = (perf_counter() - begin) * 1e3
        return result

    def _recorded_schedule(self, *args: Any, **kwargs: Any) -> Any:
        begin = perf_counter()
        output = self._schedule(*args, **kwargs)
        elapsed_ms = (perf_counter() - begin) * 1e3
        row = self._batch(output) | {"_begin": begin, "schedule_ms": elapsed_ms}
        self._scheduled.append(row)
        self._loads_before_step = len(self.loads)
        return output

    def _recorded_update(self, *args: Any, **kwargs: Any) -> Any:
        begin = perf_counter()
        result = self._update(*args, **kwargs)
        end = perf_counter()
        row = self._scheduled.popleft()
        started = max(row.pop("_begin"), self._last_end)
        row["step_ms"] = (end - started) * 1e3
        row["schedule_ms"] += (end - begin) * 1e3
        row["loads"] = len(self.loads) - self._loads_before_step
        self._last_end = end
        if row["batched_tokens"]:
            self.steps.append(row)
        return result

    def _recorded_load(self, lora_request: Any) -> Any:
        adapter, manager = lora_request.lora_int_id, self._manager
        if adapter in manager._adapter_manager._active_adapters:
            return self._load(lora_request)
        source = "memory" if adapter in manager.list_adapters() else "disk"
        # Copies to an accelerator return before they are done.
        _wait_for_accelerator()
        begin = perf_counter()
        result = self._load(lora_request)
        _wait_for_accelerator()
        row = {"rank": self._ranks[adapter], "source": source, "index": len(self.loads)}
        self.loads.append(row | {"load_ms": (perf_counter() - begin) * 1e3})
        return result

    def _batch(self, output: Any) -> dict[str, Any]:
        """Describe a scheduled batch; a decode is a request whose whole prompt is computed."""
        cached, requests = output.scheduled_cached_reqs, self._core.scheduler.requests
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        decodes = prefill_tokens = context_tokens = 0
        adapters = set()
        for request_id, tokens in output.num_scheduled_tokens.items():
            request, before = requests[request_id], computed[request_id]
            if request.lora_request is not None:
                adapters.add(request.lora_request.lora_int_id)
            if before >= request.num_prompt_tokens:
                decodes += 1
                context_tokens += before
            else:
                prefill_tokens += tokens
                context_tokens += before + tokens
        running, waiting = self._core.scheduler.get_request_counts()
        return {
            "batched_tokens": output.total_num_scheduled_tokens,
            "decodes": decodes,
            "prompts": len(output.num_scheduled_tokens) - decodes,
            "prefill_tokens": prefill_tokens,
            "context_tokens": context_tokens,
            "distinct_adapters": len(adapters),
            "rank": max((self._ranks[adapter] for adapter in adapters), default=0),
            "running": running,
            "waiting": waiting,
        }


def worker_adapters(engine: Any) -> Any | None:
    """Return the worker's adapter manager (vLLM's ``LRUCacheWorkerLoRAManager``), if it has one."""
    return getattr(model_runner(engine), "lora_manager", None)


def model_runner(engine: Any) -> Any:
    """Return the model runner of an in-process engine."""
    return engine.model_executor.driver_worker.worker.model_runner


def _wait_for_accelerator() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
