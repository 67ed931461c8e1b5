"""Adapters at a lower rank and in fewer folders, and what that gains on a GPU.

The rank is the smallest at which every module keeps a share of its energy: a vLLM slot is as large
as the largest rank of all. Merged are adapters of which each pair is alike (complete linkage of the
cosines of their deltas): into the mean of their deltas, at the largest rank that one of them needs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from joblib import delayed
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.parallel import share_out
from adapter_twin.plan.demand import Demand
from adapter_twin.shrink import low_rank
from adapter_twin.shrink.gains import AdapterSet, gains, require_same
from adapter_twin.shrink.low_rank import Factors, Matrix
from adapter_twin.shrink.peft_weights import PeftWeights, find_adapters, write_adapter
from adapter_twin.workload.adapter_folders import PEFT_CONFIG, WEIGHTS, read_adapter
from adapter_twin.workload.engine_config import LORA_RANKS
from adapter_twin.workload.gpus import gpu_memory_gib

ENERGY = 0.99
"""Share of each module's energy that is kept where nothing else is asked for."""

PROXY = (
    "energy and likeness are proxies, of the weights alone: measure the quality of what was "
    "written on your own task before you serve it"
)


class Spectrum(NamedTuple):
    """Singular values of an adapter's delta by module, and the rank that is chosen."""

    values: dict[str, Matrix]
    rank: int

    def kept_share(self, rank: int) -> float:
        """Return the share of the energy of all modules that a rank keeps; 1 of nothing."""
        whole = sum(map(low_rank.energy, self.values.values()))
        kept = sum(low_rank.energy(values[:rank]) for values in self.values.values())
        return kept / whole if whole else 1.0


class AlikeAdapters(NamedTuple):
    """Adapters by number that are merged, rank and name of the result, what each one keeps."""

    name: str
    members: tuple[int, ...]
    rank: int
    kept_shares: tuple[float, ...]


def shrink(
    folders: Sequence[str | Path],
    *,
    energy: float = ENERGY,
    rank: int | None = None,
    merge_above: float | None = None,
    out: str | Path | None = None,
    gpu: str | None = None,
    model: str | None = None,
    max_model_len: int | None = None,
    demand: Demand | None = None,
    jobs: int = -1,
) -> dict[str, Any]:
    """Tell what adapters keep at a lower rank or merged, write them, and tell what that gains.

    Parameters
    ----------
    folders : sequence of path
        PEFT LoRA adapters, or folders that hold some.
    energy : float
        Share of every module's energy that the chosen rank keeps.
    rank : int, optional
        In place of the one that keeps `energy`; an adapter of a lower one keeps its own.
    merge_above : float, optional
        Merge adapters of which each pair has at least this cosine; left out, none are merged.
    out : path, optional
        Folder, not there yet, for the adapters of the last step.
    gpu : str, optional
        For the memory of a GPU, see `adapter_twin.plan.what_fits.what_fits`.
    model : str, optional
        Served there; left out, the adapters' own base model.
    max_model_len : int, optional
        There; left out, the model's.
    demand : Demand, optional
        Traffic of the same adapters, by name, for the service that the twin expects.
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    dict
        ``adapters``: name, ``rank`` and the ``shrunk_rank``, ``kept_share`` of the energy at it,
        and the ``nearest`` other adapter with its ``cosine``; ``by_rank``: the mean and the
        least ``kept_share`` at ranks that vLLM has slots of; ``clusters`` that are merged: members
        with the ``kept_share`` of their energy, ``1 - |delta - merged|^2 / |delta|^2``, below 0
        where no adapter at all would be closer; ``steps``, see `adapter_twin.shrink.gains.gains`;
        ``proxy`` in words.

    Raises
    ------
    AdapterTwinError
        An adapter cannot be read or is no plain LoRA, `out` is there, or an option is out of range.
    """
    require_options(energy, rank, out)
    cosine = merge_above is None or 0 < merge_above <= 1
    require(cosine, f"merge_above: {merge_above} is no cosine to ask for; give one above 0")
    needs = gpu is not None or (model is None and max_model_len is None)
    require(needs, "model, max_model_len: of no use without a gpu; give one")
    for folder in folders:
        require(Path(folder).is_dir(), f"{folder}: no such folder; name one of PEFT adapters")
    # absolute: processes may have been started in another folder
    adapters = find_adapters([Path(folder).absolute() for folder in folders])
    served = model or (demand and demand.model)
    for one in adapters if served else ():
        read_adapter(one.folder, str(served))
    now = AdapterSet("as they are", {one.name: one.rank for one in adapters})
    if demand is not None:
        require_same(now, demand)
    if gpu is not None:
        gpu_memory_gib(gpu)  # the long work is not done in vain
    spectra = _in_parallel(jobs, _spectrum, ((one, energy, rank) for one in adapters))
    cosines = _cosines(adapters)
    clusters = [] if merge_above is None else _clusters(adapters, spectra, cosines, merge_above)
    names = [one.name for one in adapters]
    steps = [
        now,
        AdapterSet("shrunk", {name: one.rank for name, one in zip(names, spectra, strict=True)}),
    ]
    if merge_above is not None:
        steps.append(_merged(steps[-1], clusters, names))
    base = model or adapters[0].config.get("base_model_name_or_path")
    found = {
        "adapters": _rows(adapters, spectra, cosines),
        "by_rank": _by_rank(adapters, spectra),
        "clusters": [
            {
                "name": cluster.name,
                "rank": cluster.rank,
                "adapters": [
                    {"name": names[i], "kept_share": share}
                    for i, share in zip(cluster.members, cluster.kept_shares, strict=True)
                ],
            }
            for cluster in clusters
        ],
        "steps": gains(steps, gpu, base, max_model_len, demand),
        "out": None if out is None else str(out),
        "proxy": PROXY,
        "version": __version__,
    }
    if out is not None:
        with writing(Path(out).absolute()) as temporary:
            _write(temporary, adapters, spectra, clusters, jobs)
    return found


def require_options(energy: float, rank: int | None, out: str | Path | None) -> None:
    """Raise `AdapterTwinError` at a share, a rank or a folder to write that cannot be."""
    require(0 < energy <= 1, f"energy: {energy:g} is no share; give one above 0, at most 1")
    require(rank is None or rank >= 1, f"rank: {rank} is no rank; give 1 or more")
    require(out is None or not Path(out).exists(), f"{out}: is there; name another folder")


def _in_parallel(jobs: int, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Any:
    return share_out((delayed(work)(*arguments) for arguments in calls), jobs)


def _spectrum(adapter: PeftWeights, share: float, rank: int | None) -> Spectrum:
    with threadpool_limits(1):  # of thin matrices, threads wait for each other
        values = {
            module: low_rank.singular_values(adapter.factors(module)) for module in adapter.shapes
        }
    needed = rank or max(low_rank.needed_rank(one, share) for one in values.values())
    return Spectrum(values, min(needed, adapter.rank))


def _cosines(adapters: Sequence[PeftWeights]) -> NDArray[np.float64]:
    """Return the cosines of all pairs of deltas; one that is zero is like no other."""
    products = low_rank.inner_products(
        (
            {i: one.factors(module) for i, one in enumerate(adapters) if module in one.shapes}
            for module in sorted({module for one in adapters for module in one.shapes})
        ),
        len(adapters),
    )
    norms = np.sqrt(np.diag(products))
    scales = np.outer(norms, norms)
    cosines = np.zeros_like(products)
    np.divide(products, scales, out=cosines, where=scales > 0)
    return np.minimum(cosines, 1.0)


def _clusters(
    adapters: Sequence[PeftWeights],
    spectra: Sequence[Spectrum],
    cosines: NDArray[np.float64],
    above: float,
) -> list[AlikeAdapters]:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(adapters) == 1:
        return []
    apart = squareform(1 - cosines, checks=False)
    numbers = fcluster(linkage(apart, "complete"), 1 - above + 1e-9, "distance")
    found = []
    for number in np.unique(numbers):
        members = tuple(np.flatnonzero(numbers == number).tolist())
        if len(members) > 1:
            ours = [adapters[i] for i in members]
            rank = max(spectra[i].rank for i in members)
            kept = _kept_shares(ours, [spectra[i] for i in members], rank)
            found.append(AlikeAdapters(f"{ours[0].name}-merged", members, rank, kept))
    return found


def _means(members: Sequence[PeftWeights], rank: int) -> Iterator[tuple[str, Factors]]:
    """Yield the mean of the members' deltas at a rank, module by module."""
    for module in sorted({module for one in members for module in one.shapes}):
        parts = [one.factors(module) for one in members if module in one.shapes]
        yield module, low_rank.decompose(low_rank.mean(parts, len(members))).factors(rank)


def _kept_shares(
    members: Sequence[PeftWeights], spectra: Sequence[Spectrum], rank: int
) -> tuple[float, ...]:
    """Return ``1 - |delta - merged|^2 / |delta|^2`` of each member; 1 where it is zero."""
    gained = np.zeros(len(members))
    for module, merged in _means(members, rank):
        there = {i: one.factors(module) for i, one in enumerate(members) if module in one.shapes}
        products = low_rank.inner_products([{**there, len(members): merged}], len(members) + 1)
        gained += 2 * products[:-1, -1] - products[-1, -1]
    whole = [sum(map(low_rank.energy, one.values.values())) for one in spectra]
    return tuple(
        float(gain / all_) if all_ else 1.0 for gain, all_ in zip(gained, whole, strict=True)
    )


def _merged(
    step: AdapterSet, clusters: Sequence[AlikeAdapters], names: Sequence[str]
) -> AdapterSet:
    """Return a step in which clusters stand in place of their members."""
    members = {one.name: tuple(names[i] for i in one.members) for one in clusters}
    gone = {name for one in members.values() for name in one}
    ranks = {name: rank for name, rank in step.ranks.items() if name not in gone}
    for one in clusters:
        if one.name in ranks:
            raise AdapterTwinError(f"{one.name}: is the name of a merged adapter; rename yours")
        ranks[one.name] = one.rank
    return AdapterSet("merged", ranks, members)


def _rows(
    adapters: Sequence[PeftWeights], spectra: Sequence[Spectrum], cosines: NDArray[np.float64]
) -> list[dict[str, Any]]:
    rows = []
    for i, (one, spectrum) in enumerate(zip(adapters, spectra, strict=True)):
        others = np.where(np.arange(len(adapters)) == i, -np.inf, cosines[i])
        near = int(np.argmax(others)) if len(adapters) > 1 else None
        rows.append(
            {
                "name": one.name,
                "rank": one.rank,
                "shrunk_rank": spectrum.rank,
                "kept_share": spectrum.kept_share(spectrum.rank),
                "nearest": None if near is None else adapters[near].name,
                "cosine": None if near is None else float(cosines[i, near]),
            }
        )
    return rows


def _by_rank(
    adapters: Sequence[PeftWeights], spectra: Sequence[Spectrum]
) -> list[dict[str, float]]:
    largest = max(one.rank for one in adapters)
    rows = []
    for rank in (rank for rank in LORA_RANKS if rank < largest):
        shares = [one.kept_share(rank) for one in spectra]
        row = {"rank": rank, "mean_kept_share": sum(shares) / len(shares)}
        rows.append({**row, "least_kept_share": min(shares)})
    return rows


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside a new one, which it becomes when the block succeeds."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        require(not folder.exists(), f"{folder}: is there; name another folder")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    folder: Path,
    adapters: Sequence[PeftWeights],
    spectra: Sequence[Spectrum],
    clusters: Sequence[AlikeAdapters],
    jobs: int,
) -> None:
    """Write the adapters of the last step; one that keeps its rank is copied as it is."""
    for cluster in clusters:
        members = [adapters[i] for i in cluster.members]
        dtypes = {module: pair for one in members for module, pair in one.dtypes.items()}
        targets = sorted({module.rpartition(".")[2] for module in dtypes})
        narrowed = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        modules = ((name, part, dtypes[name]) for name, part in _means(members, cluster.rank))
        (folder / cluster.name).mkdir()
        config = {**members[0].config, "target_modules": targets, **narrowed}
        write_adapter(folder / cluster.name, config, cluster.rank, modules)
    gone = {i for cluster in clusters for i in cluster.members}
    left = (i for i in range(len(adapters)) if i not in gone)
    _in_parallel(jobs, _write_one, ((folder, adapters[i], spectra[i].rank) for i in left))


def _write_one(folder: Path, adapter: PeftWeights, rank: int) -> None:
    (folder / adapter.name).mkdir()
    if rank == adapter.rank:
        for file in (PEFT_CONFIG, WEIGHTS):
            shutil.copyfile(adapter.folder / file, folder / adapter.name / file)
        return
    parts = (
        (module, low_rank.decompose(adapter.factors(module)).factors(rank), dtypes)
        for module, dtypes in adapter.dtypes.items()
    )
    with threadpool_limits(1):
        write_adapter(folder / adapter.name, adapter.config, rank, parts)
