"""Record what vLLM's own schedulers decide, into `data/conformance/`.

The scheduler of the vLLM that is installed, or that of another one's wheel (0.8.5):

    .venv-vllm/bin/python -m tests.twin.record_conformance
    .venv-vllm/bin/pip download vllm==0.8.5 --no-deps --dest FOLDER
    .venv-vllm/bin/python -m tests.twin.record_conformance FOLDER/vllm-0.8.5-*.whl

No model runs and no GPU is needed: a request gets its token when its last prompt token is computed,
as from a model.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol
from unittest.mock import MagicMock

from adapter_twin.measure.model_folder import write_model
from study.conformance import FOLDER, NULL_BLOCK, Case, Step, feature_cases, random_cases, save

SEED, CASES, FEATURE_CASES = 0, 132, 90
MAX_MODEL_LEN = 1 << 12


class Engine(Protocol):
    """One version of vLLM."""

    def scheduler(self, case: Case) -> Any:
        """Return vLLM's scheduler for a case, without requests."""

    def request(self, case: Case, number: int) -> Any:
        """Return one of its requests."""

    def output(self, tokens: dict[str, list[int]]) -> Any:
        """Return what a model runner would, given the token of each request or none."""


def engine_steps(engine: Engine, case: Case) -> Iterator[Step]:
    """Run vLLM's scheduler on a case and yield what it decides in every step."""
    scheduler = engine.scheduler(case)
    coming = deque((arrival, number) for number, (arrival, *_) in enumerate(case.requests))
    scheduled: deque[tuple[Any, list[str]]] = deque()  # batches, and who gets a token from each
    step, was_running = 0, []
    while coming or scheduler.running or scheduler.waiting:
        if not scheduler.running and not scheduler.waiting:
            step = max(step, coming[0][0])
        while coming and coming[0][0] <= step:
            scheduler.add_request(engine.request(case, coming.popleft()[1]))
        may_be_preempted = set(was_running)
        while len(scheduled) <= case.async_scheduling:
            chosen = scheduler.schedule()  # counts its tokens as computed, and preempts
            names = chosen.num_scheduled_tokens
            if names:
                scheduled.append((chosen, [name for name in names if gets_token(scheduler, name)]))
            elif scheduled or not scheduler.running:
                break
            may_be_preempted |= {*numbers(scheduler.running)}
        begun, emitting = scheduled.popleft()
        batch = begun.num_scheduled_tokens
        last = scheduled[-1][0].num_scheduled_tokens if scheduled else {}
        last = last if case.async_scheduling else batch
        running, waiting = numbers(scheduler.running), numbers(scheduler.waiting)
        now = Step(
            step=step,
            batch={int(name): tokens for name, tokens in batch.items()},
            running={n: last.get(str(n), 0) for n in running},
            waiting=waiting,
            free_blocks=scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            adapters=len({case.requests[int(name)][1] for name in batch} - {-1}),
            admitted=[n for n in running if n not in was_running],
            preempted=[n for n in reversed(waiting) if n in may_be_preempted],
            finished=[],
        )
        was_running, before = running, set(scheduler.requests)
        emitted = {
            name: [case.token(int(name), scheduler.requests[name].num_tokens)] * (name in emitting)
            for name in batch
        }
        scheduler.update_from_output(begun, engine.output(emitted))
        yield now._replace(finished=sorted(map(int, before - set(scheduler.requests))))
        step += 1


def gets_token(scheduler: Any, name: str) -> bool:
    """Return whether a request that was just scheduled will get a token for it."""
    request = scheduler.requests[name]
    earlier = max(getattr(request, "num_output_placeholders", 0) - 1, 0)
    return bool(request.num_computed_tokens >= request.num_tokens + earlier)


def numbers(requests: Sequence[Any]) -> list[int]:
    """Return the numbers of requests."""
    return [int(request.request_id) for request in requests]


def by_index(tokens: dict[str, list[int]]) -> dict[str, Any]:
    """Return the tokens of requests as vLLM's model runners do."""
    places = {name: i for i, name in enumerate(tokens)}
    return {
        "req_ids": list(tokens),
        "req_id_to_index": places,
        "sampled_token_ids": list(tokens.values()),
    }


class Installed:
    """The vLLM that is installed: written for 0.32.0."""

    def __init__(self, folder: Path, **scheduling: bool) -> None:
        """Write a model's configuration into `folder`; `scheduling` goes to SchedulerConfig."""
        from vllm.config import ModelConfig

        logging.getLogger("vllm").setLevel(logging.ERROR)
        model = str(write_model("tiny", folder))
        self.model = ModelConfig(
            model=model, tokenizer=model, skip_tokenizer_init=True, dtype="float32"
        )
        self.scheduling = scheduling

    def scheduler(self, case: Case) -> Any:
        import torch
        from vllm import config
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        vllm_config = config.VllmConfig(
            model_config=self.model,
            scheduler_config=config.SchedulerConfig(
                max_num_seqs=case.max_num_seqs,
                max_num_batched_tokens=case.max_num_batched_tokens,
                max_model_len=min(MAX_MODEL_LEN, case.max_num_batched_tokens)
                if not case.enable_chunked_prefill
                else MAX_MODEL_LEN,
                is_encoder_decoder=False,
                enable_chunked_prefill=case.enable_chunked_prefill,
                long_prefill_token_threshold=case.long_prefill_token_threshold,
                policy="priority" if case.priorities else "fcfs",
                async_scheduling=False,  # a CPU's engine has no asynchronous one
                **self.scheduling,
            ),
            cache_config=config.CacheConfig(enable_prefix_caching=case.enable_prefix_caching),
            lora_config=config.LoRAConfig(
                max_lora_rank=8,
                max_loras=case.max_loras,
                max_cpu_loras=max(case.max_loras, case.adapters),
                lora_dtype="auto",
            ),
            device_config=config.DeviceConfig("cpu"),
        )
        cache, scheduling = vllm_config.cache_config, vllm_config.scheduler_config
        cache.num_gpu_blocks, cache.block_size = case.kv_blocks + NULL_BLOCK, case.block_size
        assert not scheduling.async_scheduling
        assert scheduling.enable_chunked_prefill == case.enable_chunked_prefill
        assert scheduling.long_prefill_token_threshold == case.long_prefill_token_threshold
        assert cache.enable_prefix_caching == case.enable_prefix_caching
        assert scheduling.max_num_batched_tokens == case.max_num_batched_tokens
        spec = FullAttentionSpec(
            block_size=case.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        return (AsyncScheduler if case.async_scheduling else Scheduler)(
            vllm_config,
            KVCacheConfig(
                num_blocks=case.kv_blocks + NULL_BLOCK,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            StructuredOutputManager(vllm_config),
            block_size=case.block_size,
        )

    def request(self, case: Case, number: int) -> Any:
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        _, adapter, prompt, output = case.requests[number]
        init_none_hash(sha256)
        return Request(
            request_id=str(number),
            prompt_token_ids=[case.token(number, place) for place in range(prompt)],
            sampling_params=SamplingParams(max_tokens=output, ignore_eos=True),
            pooling_params=None,
            arrival_time=float(number),
            lora_request=lora_request(adapter) if adapter >= 0 else None,
            priority=case.priorities[adapter] if case.priorities and adapter >= 0 else 0,
            block_hasher=get_request_block_hasher(case.block_size, sha256)
            if case.enable_prefix_caching
            else None,
        )

    def output(self, tokens: dict[str, list[int]]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        return ModelRunnerOutput(**by_index(tokens))


def lora_request(adapter: int) -> Any:
    """Return vLLM's name for an adapter; its numbers begin at 1."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{adapter}", adapter + 1, "nowhere")


class Stubs(MetaPathFinder, Loader):
    """Stands in for the modules of vLLM 0.8.5 that a scheduler imports and does not use."""

    REAL = (
        *("vllm.utils", "vllm.envs", "vllm.v1.core", "vllm.v1.request", "vllm.v1.utils"),
        *("vllm.v1.engine", "vllm.v1.outputs", "vllm.v1.kv_cache_interface"),
    )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        real = any(f"{name}.".startswith(f"{r}.") or r.startswith(f"{name}.") for r in self.REAL)
        if real or not name.startswith("vllm."):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Stub(ModuleType):
    """A module in which every name is there and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class Wheel:
    """The scheduler in the wheel of vLLM 0.8.5, all around it left out."""

    def __init__(self, wheel: Path) -> None:
        """Let `vllm` be the folder of that name in the wheel."""
        vllm = ModuleType("vllm")
        vllm.__path__ = [str(wheel / "vllm")]
        sys.modules["vllm"] = vllm
        sys.meta_path.insert(0, Stubs())
        self.module = importlib.import_module("vllm.v1.core.sched.scheduler")
        self.module.compute_encoder_budget = lambda **_: (0, 0)

    def scheduler(self, case: Case) -> Any:
        import torch

        kv = importlib.import_module("vllm.v1.kv_cache_interface")
        spec = kv.FullAttentionSpec(case.block_size, 1, 1, torch.float32, use_mla=False)
        vllm_config = SimpleNamespace(
            model_config=None,
            scheduler_config=SimpleNamespace(
                max_num_seqs=case.max_num_seqs,
                max_num_batched_tokens=case.max_num_batched_tokens,
                max_model_len=MAX_MODEL_LEN,
                long_prefill_token_threshold=0,
                chunked_prefill_enabled=True,
            ),
            cache_config=SimpleNamespace(
                num_gpu_blocks=case.kv_blocks + NULL_BLOCK,
                block_size=case.block_size,
                enable_prefix_caching=False,
                prefix_caching_hash_algo="builtin",
            ),
            lora_config=SimpleNamespace(max_loras=case.max_loras),
            kv_transfer_config=None,
            speculative_config=None,
        )
        group = kv.KVCacheGroupSpec(["layer"], spec)
        cache = kv.KVCacheConfig(case.kv_blocks + NULL_BLOCK, {}, [group])
        return self.module.Scheduler(vllm_config, cache, MagicMock())

    def request(self, case: Case, number: int) -> Any:
        _, adapter, prompt, output = case.requests[number]
        sampling = SimpleNamespace(
            max_tokens=output,
            min_tokens=0,
            ignore_eos=True,
            stop_token_ids=None,
            guided_decoding=None,
            logprobs=None,
        )
        lora = SimpleNamespace(lora_int_id=adapter + 1) if adapter >= 0 else None
        no_images = [None] * 3
        return self.module.Request(str(number), [1] * prompt, *no_images, sampling, None, 0.0, lora)

    def output(self, tokens: dict[str, list[int]]) -> Any:
        nothing = {"spec_token_ids": None, "logprobs": None, "prompt_logprobs_dict": {}}
        return self.module.ModelRunnerOutput(**by_index(tokens), **nothing)


def record(engine: Engine, cases: Iterable[Case]) -> list[tuple[Case, list[list[Any]]]]:
    """Return the cases of a recording, each with the rows of an engine's steps."""
    return [(case, [step.row() for step in engine_steps(engine, case)]) for case in cases]


def recorded_cases() -> list[Case]:
    """Return the cases of a version's recording."""
    return random_cases(SEED, CASES)


def recorded_feature_cases() -> list[Case]:
    """Return those of the recording with prefix caching, priorities and the like."""
    return feature_cases(SEED, FEATURE_CASES)


def main() -> None:
    """Write the recordings of one version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="of vLLM 0.8.5")
    wheel = parser.parse_args().wheel
    if wheel:
        version = re.findall(r"vllm-([\d.]+)-", wheel.name)[0]
        write(f"vllm-{version}", record(Wheel(wheel), recorded_cases()))
    else:
        from vllm import __version__

        version = __version__.partition("+")[0]
        with tempfile.TemporaryDirectory() as folder:
            engine = Installed(Path(folder))
            write(f"vllm-{version}", record(engine, recorded_cases()))
            write(f"vllm-{version}-features", record(engine, recorded_feature_cases()))


def write(name: str, records: list[tuple[Case, list[list[Any]]]]) -> None:
    """Write a recording, and say how much it holds."""
    save(records, FOLDER / f"{name}.json.gz")
    print(f"{name}: {len(records)} cases, {sum(len(rows) for _, rows in records)} steps")


if __name__ == "__main__":
    main()
