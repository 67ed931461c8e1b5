"""Print the log-probabilities of all next tokens after some prompts, by a real vLLM as JSON.

For the base model, then with each adapter: MODEL ADAPTER ... It runs in a process of its own, in
which vLLM is alone: numba's modules break its search for kernels.
"""

import json
import os
import sys
from pathlib import Path

PROMPTS = [list(range(5 * i + 2, 5 * i + 9)) for i in range(4)]


def main(model: str, adapters: list[str]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with Path(model, "config.json").open() as file:
        vocabulary = json.load(file)["vocab_size"]
    engine = LLM(
        model=model,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=32,
        max_logprobs=vocabulary,
    )
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=vocabulary)
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    told = []
    for number, folder in enumerate(["", *adapters]):
        lora = LoRARequest(f"adapter-{number}", number, folder) if folder else None
        answers = engine.generate(prompts, asked, lora_request=lora)
        first = [one.outputs[0].logprobs[0] for one in answers]
        told.append([[one[token].logprob for token in sorted(one)] for one in first])
    print(json.dumps(told))


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    main(sys.argv[1], sys.argv[2:])
