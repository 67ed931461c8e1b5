"""Adapters of known spectra: ranks found, products kept, alike ones merged, bad ones refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.what_fits import what_fits
from adapter_twin.shrink.peft_weights import PeftWeights
from adapter_twin.shrink.shrink import shrink
from adapter_twin.workload.adapters import Adapter
from adapter_twin.workload.tensor_files import TensorFile, write_tensors
from adapter_twin.workload.traffic import Lengths
from tests.shrink.conftest import CONFIG, LLAMA_WIDTHS, Make, tensor

LLAMA = {"base_model_name_or_path": "meta-llama/Llama-3.1-8B", "widths": LLAMA_WIDTHS}
EPSILONS = {"F64": 1e-12, "F32": 1e-6, "F16": 2e-3, "BF16": 1.6e-2}
Q0 = tensor(0, "q_proj")


def products(folder: Path) -> dict[str, Any]:
    """Return the deltas of a folder as vLLM makes them: one scaling for all modules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    file = TensorFile(folder / "adapter_model.safetensors")
    modules = {name.partition(".lora_")[0] for name in file.places}
    sides = {m: [file.read(f"{m}.lora_{side}.weight") for side in "BA"] for m in modules}
    assert {b.shape[1] for b, _ in sides.values()} == {config["r"]}
    return {m: config["lora_alpha"] / config["r"] * b @ a for m, (b, a) in sides.items()}


def difference(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_ranks_of_32_known_spectra_are_found_exactly_and_their_energy_to_a_millionth(
    make: Make, tmp_path: Path
) -> None:
    draw = np.random.default_rng(7)
    wanted = {}
    for i in range(32):
        values = np.sort(draw.uniform(0.5, 3, 1 + i % 16))[::-1]
        energies = values**2 / (values @ values)
        # of all values but the last: below them and a half of it
        share = 1 - energies[-1] / 2
        make(f"one-{i:02}", values, seed=i)
        wanted[f"one-{i:02}"] = (len(values), share, energies)
    for name, (rank, share, energies) in wanted.items():
        (row,) = shrink([tmp_path / "adapters" / name], energy=share)["adapters"]
        assert (row["shrunk_rank"], row["rank"]) == (rank, 16)
        (row,) = shrink([tmp_path / "adapters" / name], rank=max(rank - 1, 1))["adapters"]
        assert row["kept_share"] == pytest.approx(energies[: max(rank - 1, 1)].sum(), abs=1e-6)
    (whole,) = shrink([tmp_path / "adapters" / "one-04"], energy=1.0)["adapters"]
    assert whole["shrunk_rank"] == 5  # numerically zero values count as none


@pytest.mark.parametrize("dtype", EPSILONS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_written_is_the_product_to_the_precision_of_its_type(
    make: Make, tmp_path: Path, dtype: str, use_rslora: bool
) -> None:
    dense = make("sql", [2, 1, 0.5], dtype=dtype, use_rslora=use_rslora, r=8, mixed=False)
    shrink([tmp_path / "adapters"], rank=3, out=tmp_path / "smaller")
    written = products(tmp_path / "smaller" / "sql")
    assert set(PeftWeights(tmp_path / "smaller" / "sql").dtypes.values()) == {(dtype, dtype)}
    hidden = np.random.default_rng(1).standard_normal((5, 48))
    for module, product in dense.items():
        assert difference(hidden @ written[module].T, hidden @ product.T) < EPSILONS[dtype]


def test_a_lower_rank_is_the_best_approximation_of_that_rank(make: Make, tmp_path: Path) -> None:
    dense = make("sql", [4, 3, 2, 1])
    shrink([tmp_path / "adapters"], energy=0.8, out=tmp_path / "smaller")
    for module, product in products(tmp_path / "smaller" / "sql").items():
        assert np.linalg.matrix_rank(product) == 2
        assert np.linalg.norm(dense[module] - product) ** 2 == pytest.approx(2**2 + 1**2)


def test_patterns_of_rank_and_alpha_are_folded_into_one_scaling(make: Make, tmp_path: Path) -> None:
    dense = make("sql", [2, 1, 0.5])
    path = tmp_path / "adapters" / "sql" / "adapter_config.json"
    path.write_text(json.dumps({**CONFIG, "alpha_pattern": {"layers.0.self_attn.q_proj": 64}}))
    shrink([tmp_path / "adapters"], rank=3, out=tmp_path / "smaller")
    written = products(tmp_path / "smaller" / "sql")
    assert difference(written[Q0], 2 * dense[Q0]) < 1e-12
    assert difference(written[tensor(1, "q_proj")], dense[tensor(1, "q_proj")]) < 1e-12


def test_an_adapter_that_needs_its_rank_is_copied_bit_for_bit(make: Make, tmp_path: Path) -> None:
    make("sql", [1.0] * 16, dtype="BF16")
    shrink([tmp_path / "adapters"], out=tmp_path / "smaller")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files = [tmp_path / where / "sql" / name for where in ("adapters", "smaller")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_of_zeros_needs_rank_1(make: Make, tmp_path: Path) -> None:
    make("new", [0.0])
    make("sql", [1.0], seed=1)
    rows = shrink([tmp_path / "adapters"], out=tmp_path / "smaller")["adapters"]
    assert [(row["shrunk_rank"], row["kept_share"], row["cosine"]) for row in rows] == [
        (1, 1.0, 0.0),
        (1, 1.0, 0.0),
    ]
    assert not any(one.any() for one in products(tmp_path / "smaller" / "new").values())


def test_likeness_is_the_cosine_of_the_dense_products(make: Make, tmp_path: Path) -> None:
    first = make("a", [2, 1])
    other = make("b", [2, 1], deltas=first, noise=1.0, seed=3)
    flat = [np.concatenate([one[m].ravel() for m in first]) for one in (first, other)]
    rows = shrink([tmp_path / "adapters"])["adapters"]
    cosine = flat[0] @ flat[1] / np.prod([np.linalg.norm(one) for one in flat])
    assert [row["cosine"] for row in rows] == pytest.approx([cosine, cosine], abs=1e-12)
    assert rows[0]["nearest"] == "b"


def test_alike_adapters_are_merged_into_their_mean_and_the_others_left(
    make: Make, tmp_path: Path
) -> None:
    first = make("a", [2, 1])
    other = make("b", [2, 1], deltas=first, noise=0.2, seed=3)
    make("c", [2, 1], seed=4)
    found = shrink([tmp_path / "adapters"], rank=4, merge_above=0.9, out=tmp_path / "smaller")
    (cluster,) = found["clusters"]
    assert cluster["name"] == "a-merged"
    written = products(tmp_path / "smaller" / "a-merged")
    assert {path.name for path in (tmp_path / "smaller").iterdir()} == {"a-merged", "c"}
    left = over = 0.0
    for module, product in first.items():
        mean = (product + other[module]) / 2
        values = np.linalg.svd(mean, compute_uv=False)
        assert np.linalg.norm(mean - written[module]) == pytest.approx(
            np.linalg.norm(values[4:]), rel=1e-6
        )
        left += np.linalg.norm(other[module] - written[module]) ** 2
        over += np.linalg.norm(other[module]) ** 2
    assert cluster["adapters"][1] == {"name": "b", "kept_share": pytest.approx(1 - left / over)}
    assert [(one["step"], one["adapters"]) for one in found["steps"]] == [
        ("as they are", 3),
        ("shrunk", 3),
        ("merged", 2),
    ]


def test_what_is_gained_of_a_gpu_is_what_memory_tells(make: Make, tmp_path: Path) -> None:
    make("a", [2, 1], **LLAMA)
    asked = {"model": "llama-3.1-8b", "gpu": "24", "max_model_len": 4096}
    first, last = shrink([tmp_path / "adapters"], **asked)["steps"]
    for step, rank in ((first, 16), (last, 8)):
        flags = {"max_loras": 1, "max_lora_rank": rank, "max_model_len": 4096}
        known = what_fits("llama-3.1-8b", "24", flags)
        assert step["max_lora_rank"] == rank
        for name in ("slot_mib", "largest_max_loras", "kv_cache_tokens"):
            assert step["memory"][name] == known[name]
    assert last["memory"]["largest_max_loras"] > first["memory"]["largest_max_loras"]


LENGTHS = Lengths(mean_input_tokens=223, mean_output_tokens=198)


def demand(*adapters: tuple[str, int]) -> Demand:
    asked = [Adapter(name=name, rank=rank, request_rate=0.1) for name, rank in adapters]
    return Demand(model="llama-3.1-8b-instruct", adapters=tuple(asked), lengths=LENGTHS)


def test_a_merged_adapter_gets_the_requests_of_its_members(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapter_twin.shrink import gains

    asked: list[Demand] = []
    monkeypatch.setattr(gains, "_service", lambda one: asked.append(one) or {"serves": True})
    same = make("a", [2, 1], **LLAMA)
    make("b", [2, 1], deltas=same, **LLAMA)
    shrink([tmp_path / "adapters"], merge_above=0.9, demand=demand(("a", 16), ("b", 16)))
    told = [[(one.name, one.rank, one.request_rate) for one in d.adapters] for d in asked]
    assert told == [
        [("a", 16, 0.1), ("b", 16, 0.1)],
        [("a", 2, 0.1), ("b", 2, 0.1)],
        [("a-merged", 2, 0.2)],
    ]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([("a", 16), ("z", 8)], "workload.adapters: 'z' is not in the folders"),
        ([("a", 8)], "'a' has rank 8, its folder 16; correct it"),
    ],
)
def test_traffic_of_other_adapters_is_refused(
    make: Make, tmp_path: Path, adapters: list[tuple[str, int]], message: str
) -> None:
    make("a", [2, 1], **LLAMA)
    with pytest.raises(AdapterTwinError, match=message):
        shrink([tmp_path / "adapters"], demand=demand(*adapters))


def weights(**tensors: Any) -> Callable[[Path], None]:
    """Return what writes other tensors over an adapter's."""
    told = [(name.replace("__", "."), "F32", np.asarray(one)) for name, one in tensors.items()]
    return lambda folder: write_tensors(folder / "adapter_model.safetensors", told)


def header(change: Callable[[dict[str, Any]], object], more: int = 0) -> Callable[[Path], None]:
    """Return what changes the header of an adapter's weights."""

    def write(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + size])
        change(content)
        text = json.dumps(content).encode()
        path.write_bytes((len(text) + more).to_bytes(8, "little") + text + raw[8 + size :])

    return write


def config(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))

    return write


A, B = np.ones((16, 4)), np.ones((4, 16))


def with_nan(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + np.array([np.nan]).tobytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(use_dora=True), "use_dora = True"),
        (config(modules_to_save=["lm_head"]), "modules_to_save"),
        (config(bias="all"), "bias = 'all'"),
        (config(r=8), r"have not the rank 8 of adapter_config.json; save it again"),
        (config(rank_pattern={"(": 8}), r"no pattern '\('; correct it"),
        (config(lora_alpha="x"), "lora_alpha 'x' is no number"),
        (weights(m__lora_magnitude_vector=A), "m.lora_magnitude_vector is no LoRA of a linear"),
        (weights(m__lora_embedding_A=A), "m.lora_embedding_A is no LoRA of a linear layer"),
        (weights(m__lora_A__weight=A), "m has A or B alone"),
        (
            weights(m__lora_A__weight=A[..., None, None], m__lora_B__weight=B),
            r"m is no linear layer, A \(16, 4, 1, 1\)",
        ),
        (with_nan, "NaN or infinite weights"),
        (header(lambda h: h[f"{Q0}.lora_A.weight"].update(dtype="I64")), "is I64; save it as"),
        (header(lambda h: h[f"{Q0}.lora_A.weight"].update(dtype="F4")), "header is damaged"),
        (header(lambda h: h[f"{Q0}.lora_A.weight"].pop("shape")), "header is damaged"),
        (header(lambda h: h[f"{Q0}.lora_A.weight"].update(shape=[1 << 62, 9])), "is damaged in"),
        (header(lambda h: h[f"{Q0}.lora_A.weight"]["data_offsets"].reverse()), "is damaged in"),
        (
            header(lambda h: h.update({f"{Q0}.lora_A.weight": h[f"{Q0}.lora_B.weight"]})),
            "is damaged in its header",
        ),
        (header(lambda h: None, more=1 << 40), "no safetensors file; save it again"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 4),
            "no safetensors file",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no such file"),
    ],
)
def test_what_is_no_plain_lora_is_refused_in_one_line(
    make: Make, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    make("sql", [2, 1])
    change(tmp_path / "adapters" / "sql")
    with pytest.raises(AdapterTwinError, match=message) as error:
        shrink([tmp_path / "adapters"], out=tmp_path / "smaller")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "smaller").exists()


def test_a_file_cut_short_is_refused(make: Make, tmp_path: Path) -> None:
    make("sql", [2, 1])
    path = tmp_path / "adapters" / "sql" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(AdapterTwinError, match="do not end where the file does"):
        shrink([tmp_path / "adapters"])


def test_adapters_of_two_bases_are_refused(make: Make, tmp_path: Path) -> None:
    make("a", [1.0])
    make("b", [1.0], base_model_name_or_path="org/other")
    with pytest.raises(AdapterTwinError, match="an adapter of org/other, not of org/base"):
        shrink([tmp_path / "adapters"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"energy": 0}, "energy: 0 is no share"),
        ({"energy": float("nan")}, "energy: nan is no share"),
        ({"rank": 0}, "rank: 0 is no rank"),
        ({"merge_above": -1.0}, "merge_above: -1.0 is no cosine"),
        ({"max_model_len": 9}, "of no use without a gpu"),
        ({"gpu": "24"}, "org/base"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    make: Make, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    make("a", [1.0])
    with pytest.raises(AdapterTwinError, match=message):
        shrink([tmp_path / "adapters"], **asked)


def test_nothing_is_written_over_and_a_failure_leaves_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("a", [2.0, 1.0])
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterTwinError, match="there: is there; name another folder"):
        shrink([tmp_path / "adapters"], out=tmp_path / "there")
    monkeypatch.setattr("adapter_twin.shrink.shrink.write_adapter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shrink([tmp_path / "adapters"], out=tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"adapters", "there"}
