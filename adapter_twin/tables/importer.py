"""Import the raw repository of the reference study into the tables ``runs`` and ``series``."""

import os
import subprocess
from pathlib import Path

import pandas as pd

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.tables.datasets import DATASET, EXTERNAL, write_table
from adapter_twin.tables.run_folder import CAMPAIGNS, RESULTS, read_run
from adapter_twin.tables.schemas import RUNS, SERIES, validate

REPOSITORY_URL = "https://github.com/FerranAgulloLopez/GPULLMAdapterOptimization"
COMMIT = "bae36e2dad9615d851ff32d10a96633d21615647"


def import_repository(source: Path | None = None, out: Path = EXTERNAL) -> list[Path]:
    """Parse the raw repository and write the tables ``runs`` and ``series``.

    Parameters
    ----------
    source : pathlib.Path, optional
        Root of a clone, or its folder ``definitive_results``; fetched with git when left out.
    out : pathlib.Path
        The tables go to ``out/agullo2025/``, a fetched clone to ``out/GPULLMAdapterOptimization``.

    Returns
    -------
    list of pathlib.Path
        The tables written.

    Raises
    ------
    AdapterTwinError
        git fails, no run folder is found, or a file is damaged; no table is written then.
    """
    root = fetch_repository(out / REPOSITORY_URL.rpartition("/")[2]) if source is None else source
    runs, series = read_repository(root)
    folder = out / DATASET
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"runs": runs, "series": series}
    return [write_table(table, folder / f"{name}.parquet") for name, table in tables.items()]


def fetch_repository(folder: Path, url: str = REPOSITORY_URL, commit: str = COMMIT) -> Path:
    """Check out the two campaigns at the pinned commit, without history or other files.

    Parameters
    ----------
    folder : pathlib.Path
        Becomes the clone.
    url, commit : str

    Raises
    ------
    AdapterTwinError
        git is missing or fails; the message holds git's reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _git(folder, "init", "--quiet")
    _git(folder, "sparse-checkout", "set", *(f"{RESULTS}/{c.folder}" for c in CAMPAIGNS))
    # A named remote, so that the checkout can fetch just the files it needs.
    _git(folder, "config", "remote.origin.url", url)
    _git(folder, "fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", commit)
    _git(folder, "-c", "advice.detachedHead=false", "checkout", "--quiet", commit)
    return folder


def _git(folder: Path, *arguments: str) -> None:
    command = ["git", "-C", str(folder), *arguments]
    # A private or mistyped address must fail, not wait for a password.
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", "git is not installed").strip() or str(error)
        raise AdapterTwinError(
            f"{folder}: git {arguments[0]} failed ({told.splitlines()[-1]}); clone "
            f"{REPOSITORY_URL} yourself and give its folder to `adapter-twin data --import`"
        ) from None


def read_repository(source: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Parse every run below `source`.

    Returns
    -------
    runs, series : pandas.DataFrame
        With the columns of the published tables; both checked against their schemas.
    """
    root = source / RESULTS if (source / RESULTS).is_dir() else source
    parsed = [
        read_run(folder, campaign)
        for campaign in CAMPAIGNS
        for folder in sorted((root / campaign.folder).glob("*/*/_*_*_*_"))
    ]
    require(
        bool(parsed),
        f"{source}: no run folders below {' or '.join(c.folder for c in CAMPAIGNS)}; "
        f"give the root of a clone of {REPOSITORY_URL}",
    )
    runs = pd.DataFrame([run for run, _ in parsed])
    samples = [series for _, series in parsed if series is not None]
    require(bool(samples), f"{source}: no run has sampled metrics (time.npy); clone it again")
    series = pd.concat(samples, ignore_index=True)
    return validate(runs, RUNS, source), validate(series, SERIES, source)
