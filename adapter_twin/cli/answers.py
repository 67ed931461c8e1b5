"""Answers for people: first what is answered, then flags to copy, why, and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from adapter_twin.cli.report import figures, print_command, print_mapping, print_table, print_text
from adapter_twin.plan.commands import flag_words
from adapter_twin.plan.criterion import slo_met
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import slot_rank
from adapter_twin.workload.files import parse_ranks
from adapter_twin.workload.scenario import Slo

Answer = Mapping[str, Any]

WAITS = ("mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "slo_attainment")


def show_recommendation(answer: Answer, demand: Demand) -> None:
    """Print what `adapter_twin.plan.recommend.recommend` returns."""
    told = figures({name: one["value"] for name, one in answer["expected"].items()}, *WAITS)
    who = f"{len(demand.adapters):,} adapters"
    slots, slo = answer["adapter_slots"], _slo(demand.slo)
    sure = "" if demand.slo is None else f", {figures(answer, 'slo_met_probability')}"
    print_text(f"{slots} slots serve the {who} on one GPU {slo}: {told}{sure}.\n")
    model = _served(demand.model)
    print_command("vllm", "serve", model, *answer["vllm_args"])
    launch = ("python", "-m", "sglang.launch_server", "--model-path", model)
    print_command(*launch, *answer["sglang_args"])
    print_text(f"Why: {answer['reason']}.\n")
    expected = pd.DataFrame(answer["expected"]).rename_axis("").reset_index()
    print_table(expected, "Expected service, with 95 % intervals")
    print_table(pd.DataFrame(answer["what_if"]), "What if: other slots, and other loads")
    cold = pd.DataFrame(answer["cold_start_states"])
    print_table(cold, "After a start under all this load, before any adapter was used")
    if answer["worst_served"] is not None:
        print_mapping(answer["worst_served"], "Worst-served adapter")
    names = ("kv_cache_tokens", "offered_tokens_per_s", "startup_s", "first_uses_s", "utilisation")
    print_mapping({name: answer[name] for name in names}, "The GPU")
    _print_origin(answer)


def show_placement(answer: Answer, demand: Demand) -> None:
    """Print what `adapter_twin.fleet.place.place` returns."""
    table = pd.DataFrame(answer["replicas"])
    slowest = figures({"mean_ttft_ms": table.mean_ttft_ms.max()}, "mean_ttft_ms")
    gpus = "1 GPU serves" if answer["gpus"] == 1 else f"{answer['gpus']} GPUs serve"
    advice = f"; {answer['advice']}" if answer["advice"] else ""
    print_text(
        f"{gpus} the {len(demand.adapters):,} adapters {_slo(demand.slo)}, where "
        f"{answer['lower_bound']} at least would be needed; on the slowest {slowest}{advice}.\n"
    )
    _print_price(answer)
    for words, alike in table.groupby(table.vllm_args.map(tuple), sort=False):
        print(f"GPU {', '.join(map(str, alike.index))}:")
        print_command("vllm", "serve", _served(demand.model), *words)
    kind = ["kind"] if "gpu" in table else []
    table = table.rename(columns={"gpu": "kind"}).assign(
        adapters=table.adapters.map(len), rank=table.max_lora_rank, gpu=table.index
    )
    names = ["gpu", *kind, "adapters", "adapter_slots", "rank", "utilisation", "total_throughput"]
    print_table(table[[*names, *(name for name in WAITS if name in table)]], "GPUs")
    _print_origin(answer)


def _print_price(answer: Answer) -> None:
    """Print what a fleet costs, and what the loss of a GPU would."""
    told = []
    if answer.get("price_per_hour"):
        least = answer["price_lower_bound_per_hour"]
        told.append(f"Price: {answer['price_per_hour']:,.2f} an hour; {least:,.2f} at least.")
    if "spare" in answer:
        told.append(_spare(answer["spare"], answer["gpus"]))
    if told:
        print_text(f"{' '.join(told)}\n")


def _spare(spare: Answer | None, gpus: int) -> str:
    if spare is None:
        return "No available GPU can take over from each of these."
    if not spare["gpus"]:
        return "The loss of any one GPU is borne by the others."
    price = f", {spare['price_per_hour']:,.2f} an hour" if spare["price_per_hour"] else ""
    return (
        f"To bear the loss of any one GPU, keep ready {', '.join(spare['kinds'])}{price}; of "
        f"{spare['borne']} of {gpus} the others bear it."
    )


def show_optimum(answer: Answer, model: str, ranks: str, slo: Slo | None) -> None:
    """Print what `adapter_twin.plan.optimum.optimum` returns."""
    served, slots = answer["served_adapters"], answer["adapter_slots"]
    edge = "; the grid ends there, more might be served" if answer["at_edge"] else ""
    told = figures(answer, "total_throughput", *WAITS)
    print_text(f"{served} adapters on {slots} slots serve best {_slo(slo)}: {told}{edge}.\n")
    flags = {"enable_lora": True, "max_loras": slots, "max_cpu_loras": served}
    rank = slot_rank(parse_ranks(ranks))
    print_command("vllm", "serve", _served(model), *flag_words(flags | {"max_lora_rank": rank}))
    if answer["alternatives"]:
        print_table(pd.DataFrame(answer["alternatives"]), "Alternatives")
    _print_origin(answer)


def show_service(answer: Answer, title: str) -> None:
    """Print what `adapter_twin.service.predict.predict_scenario` tells, or a fleet."""
    told = figures(answer, "total_throughput", "offered_tokens_per_s", *WAITS, "worst_adapter")
    print_text(f"{'Starved' if answer['starved'] else 'Served'}: {told}.\n")
    if "states" in answer:
        print_table(pd.DataFrame(answer["states"]), f"States, over {answer['draws']} draws")
    _print_rest(answer, title)


def show_memory(answer: Answer) -> None:
    """Print what `adapter_twin.plan.what_fits.what_fits` returns."""
    gpu = f"{answer['gpu']} ({figures(answer, 'memory_gib')})"
    what = f"{answer['model']} on {gpu} with {figures(answer, 'max_loras', 'max_lora_rank')}"
    flags = {"enable_lora": True, **answer["flags"]}
    if not answer["starts"]:
        print_text(f"vLLM {answer['engine_version']} does not start {what}. {answer['reason']}\n")
    else:
        told = figures(answer, "kv_cache_tokens", "largest_max_loras")
        graphs = ""
        if answer["estimates_graphs"]:
            flags["kv_cache_memory_bytes"] = answer["kv_cache_memory_bytes"]
            graphs = " With its last flag vLLM takes no estimate of its CUDA graphs off the cache."
        print_text(f"vLLM {answer['engine_version']} starts {what}: {told}.{graphs}\n")
        print_command("vllm", "serve", answer["model"], *flag_words(flags))
    for title, name, columns in (
        ("Most slots", "largest_max_loras_by_rank", ["max_lora_rank", "largest_max_loras"]),
        ("Requests at once", "requests_at_once_by_tokens", ["request_tokens", "requests"]),
    ):
        rows = [(int(key), value) for key, value in answer[name].items()]
        print_table(pd.DataFrame(rows, columns=columns), title)
    _print_rest(answer, "Memory")


def show_shrunk(answer: Answer) -> None:
    """Print what `adapter_twin.shrink.shrink.shrink` returns."""
    steps = pd.DataFrame(answer["steps"])
    first, last = answer["steps"][0], answer["steps"][-1]
    told = [f"{one['adapters']:,} in slots of rank {one['max_lora_rank']}" for one in (first, last)]
    where = f", written to {answer['out']}" if answer["out"] else ""
    print_text(f"Adapters as they are: {told[0]}; {last['step']}: {told[1]}{where}.")
    print_text(f"Mind: {answer['proxy']}.\n")
    print_table(pd.DataFrame(answer["adapters"]), "Adapters, and the energy kept")
    print_table(pd.DataFrame(answer["by_rank"]), "Energy kept by rank, over all adapters")
    for cluster in answer["clusters"]:
        print_table(pd.DataFrame(cluster["adapters"]), f"What {cluster['name']} keeps")
    for name, title in (("memory", "Memory of a GPU"), ("service", "Service on one GPU")):
        if first[name] is not None:
            gained = pd.DataFrame(list(steps[name])).dropna(axis=1, how="all")
            print_table(
                pd.concat([steps[["step", "adapters", "max_lora_rank"]], gained], axis=1), title
            )


def show_extracted(answer: Answer) -> None:
    """Print what `adapter_twin.shrink.extract.extract` returns."""
    where = f", written to {answer['out']}" if answer["out"] else ""
    told = figures(answer, "rank", "kept_share", "left_out_share")
    print_text(f"An adapter of {told}{where}.")
    print_text(f"Mind: {answer['proxy']}.\n")
    print_table(pd.DataFrame(answer["modules"]), "Modules, and the energy kept of their change")


def _slo(slo: Slo | None) -> str:
    return "without an SLO" if slo is None else f"with {slo_met(slo)}"


def _served(model: str) -> str:
    """Return a model as ``vllm serve`` takes it; our own short names mean nothing to it."""
    return model if "/" in model else "MODEL"


def _print_rest(answer: Answer, title: str) -> None:
    """Print all single figures of an answer, and where it comes from."""
    hidden = ("reason", "states", "draws", "seed", "version", "config_hash", "calibration", "prior")
    single = {name: value for name, value in answer.items() if not isinstance(value, dict)}
    print_mapping({name: value for name, value in single.items() if name not in hidden}, title)
    _print_origin(answer)


def _print_origin(answer: Answer) -> None:
    """Print what an answer rests on."""
    names = ("version", "calibration", "seed", "config_hash", "traffic", "criterion")
    print_text(", ".join(f"{name} {answer[name]}" for name in names if name in answer))
