"""Measured tables: where they are looked for, how they are read, how results are written.

A data set is a folder of Parquet and CSV tables. It is looked for below ``$ADAPTER_TWIN_DATA``,
in ``data/`` and ``data/external/`` of the repository, then in ``../shared/data`` beside it, table
by table: a folder that holds the runs alone does not hide the other tables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.workload.shipped import REPOSITORY as REPOSITORY
from adapter_twin.workload.shipped import SHIPPED

# pandas, pandera and pyarrow are imported late: who only asks where data lies needs none of them.
if TYPE_CHECKING:
    import pandas as pd
    from pandera.pandas import DataFrameSchema

    from adapter_twin.workload.trace import LengthMarginals

EXTERNAL = REPOSITORY / "data" / "external"
"""Imported data goes to this folder, which git ignores."""
CHECKSUMS = SHIPPED / "checksums.json"
"""This file holds the SHA-256 of the measured tables by data set and file name."""
DATASET = "agullo2025"
"""The reference study's measurements have this name."""


def roots() -> list[Path]:
    """Return the folders in which data sets are looked for, first choice first."""
    chosen = os.environ.get("ADAPTER_TWIN_DATA")
    first = [Path(chosen).expanduser()] if chosen else []
    return [*first, REPOSITORY / "data", EXTERNAL, REPOSITORY.parent / "shared" / "data"]


def find(table: str, dataset: str = DATASET) -> Path | None:
    """Return the first file that holds a measured table (``runs``, ``series``, ...), or None."""
    candidates = (root / dataset / file_name(table) for root in roots())
    return next((path for path in candidates if path.is_file()), None)


def file_name(table: str) -> str:
    """Return the name under which a measured table is stored."""
    return f"{table}.csv" if table == "sharegpt_lengths" else f"{table}.parquet"


def load(table: str, dataset: str = DATASET) -> pd.DataFrame:
    """Read a measured table and check it against its schema.

    Raises
    ------
    AdapterTwinError
        No such table in `adapter_twin.tables.schemas.TABLES`, absent data (the message says how to
        get it) or a damaged file.

    Examples
    --------
    >>> int(load("memory")["adapter_slots"].min())
    8
    """
    from adapter_twin.tables.schemas import TABLES
    from adapter_twin.workload.strict import suggestion

    if table not in TABLES:
        raise AdapterTwinError(f"table: no table {table!r}{suggestion(table, TABLES)}")
    path = find(table, dataset)
    if path is None:
        looked = "" if Path(dataset).is_absolute() else f" in {', '.join(map(str, roots()))}"
        raise AdapterTwinError(
            f"{dataset}/{file_name(table)}: not found{looked}; "
            f"point ADAPTER_TWIN_DATA to a folder that holds {DATASET}/, "
            "as data/ of a clone of this repository does"
        )
    return read_table(path, TABLES[table])


def read_campaign(folder: str | Path) -> dict[str, pd.DataFrame]:
    """Read the tables that `adapter-twin profile` left in a folder.

    Returns
    -------
    dict of str to pandas.DataFrame
        By the names of `adapter_twin.tables.campaign_schemas.CAMPAIGN_TABLES`; a table of which the
        campaign measured nothing is left out.

    Raises
    ------
    AdapterTwinError
        The folder holds no campaign, or a table is damaged.
    """
    from adapter_twin.tables.campaign_schemas import CAMPAIGN_TABLES

    paths = {name: Path(folder) / f"{name}.parquet" for name in CAMPAIGN_TABLES}
    there = {name: path for name, path in paths.items() if path.is_file()}
    absent = f"{folder}: holds no campaign's tables; measure one with `adapter-twin profile`"
    require(bool(there), absent)
    return {name: read_table(path, CAMPAIGN_TABLES[name]) for name, path in there.items()}


def sharegpt_lengths(dataset: str = DATASET) -> LengthMarginals:
    """Return the histograms of ShareGPT prompt and output lengths, in tokens."""
    from adapter_twin.workload.trace import LengthMarginals

    bins = load("sharegpt_lengths", dataset)
    sides: dict[str, Any] = {}
    for kind in ("prompt", "output"):
        side = bins[bins["kind"] == kind].sort_values("bin_left_tokens")
        left, right = side["bin_left_tokens"].to_numpy(), side["bin_right_tokens"].to_numpy()
        joined = len(side) > 0 and bool((left[1:] == right[:-1]).all())
        require(joined, f"sharegpt_lengths: the {kind} bins do not join; fetch the table again")
        sides[f"{kind}_edges"] = (*left.tolist(), float(right[-1]))
        sides[f"{kind}_counts"] = tuple(side["count"].tolist())
    return LengthMarginals(**sides)


def inventory(dataset: str = DATASET) -> pd.DataFrame:
    """List the measured tables, where they lie, and whether they are as published.

    Returns
    -------
    pandas.DataFrame
        One row per table: ``table``, ``file`` (empty where absent), ``size_bytes``, ``rows`` and
        ``checksum`` (ok, mismatch, absent, or unregistered where no checksum is known). An import
        of the raw repository mismatches: the tables here leave some of its runs out.
    """
    import pandas as pd
    import pooch

    from adapter_twin.tables.schemas import TABLES

    known = json.loads(CHECKSUMS.read_text()).get(dataset, {}) if CHECKSUMS.is_file() else {}
    entries = []
    for table in TABLES:
        path, expected = find(table, dataset), known.get(file_name(table))
        if path is None:
            entries.append((table, "", 0, 0, "absent"))
            continue
        matches = expected == f"sha256:{pooch.file_hash(str(path), alg='sha256')}"
        checksum = "unregistered" if expected is None else "ok" if matches else "mismatch"
        entries.append((table, str(path), path.stat().st_size, _count_rows(path), checksum))
    return pd.DataFrame(entries, columns=["table", "file", "size_bytes", "rows", "checksum"])


def _count_rows(path: Path) -> int:
    try:
        return len(read_frame(path, columns=[]))
    except AdapterTwinError:
        return 0  # The checksum already tells that the file is damaged.


def read_runs(path: str | Path) -> pd.DataFrame:
    """Read the configuration columns of a table of runs, and no other column.

    Returns
    -------
    pandas.DataFrame
        The columns of `adapter_twin.tables.schemas.RUN_CONFIGURATION`, one row per run.

    Raises
    ------
    AdapterTwinError
        Missing, empty, malformed or truncated file, missing column, value out of range.
    """
    from adapter_twin.tables.schemas import RUN_CONFIGURATION

    return read_table(path, RUN_CONFIGURATION, columns=list(RUN_CONFIGURATION.columns))


def read_measured_runs(path: str | Path) -> pd.DataFrame:
    """Read a table of runs, published or of a campaign; raises as `read_runs`."""
    from adapter_twin.tables.campaign_schemas import CAMPAIGN_RUNS
    from adapter_twin.tables.schemas import RUNS, validate

    frame = read_frame(path)
    return validate(frame, CAMPAIGN_RUNS if "held_out" in frame else RUNS, path)


def read_table(
    path: str | Path, schema: DataFrameSchema, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Read a Parquet or CSV file and check it against `schema`; raises as `read_runs`.

    Parameters
    ----------
    path : str or pathlib.Path
    schema : pandera.pandas.DataFrameSchema
    columns : sequence of str, optional
        The only ones to read.
    """
    from adapter_twin.tables.schemas import validate

    return validate(read_frame(path, columns), schema, path)


def read_frame(path: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a Parquet or CSV file that is there, whole and not empty."""
    path = Path(path)
    require(not path.is_dir(), f"{path}: is a folder; give a table in it, .parquet or .csv")
    _require_suffix(path)
    require(path.is_file(), f"{path}: no such file; check the path")
    require(path.stat().st_size > 0, f"{path}: the file is empty; fetch or write it again")
    try:
        return _read(path, columns)
    except (ValueError, OSError) as error:  # Arrow's and pandas' reading errors are ValueErrors.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise AdapterTwinError(
            f"{path}: malformed or truncated {path.suffix[1:]} table ({reason.rstrip('.')}); "
            "fetch or write it again"
        ) from None


def _read(path: Path, columns: Sequence[str] | None) -> pd.DataFrame:
    import pandas as pd

    if path.suffix == ".csv":
        # "8" and "0.1" alone would otherwise be read as numbers.
        text = dict.fromkeys(("run_id", "rates_per_adapter", "ranks"), str)
        frame = pd.read_csv(path, dtype=text)
        return frame if columns is None else frame[[c for c in columns if c in frame]]
    from pyarrow import parquet

    present = parquet.read_schema(path).names
    wanted = None if columns is None else [name for name in columns if name in present]
    with path.open("rb") as file:  # Arrow itself would open it unheard by a chapter's `Watch`.
        return pd.read_parquet(file, columns=wanted)


def write_table(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as Parquet or CSV, by suffix: the whole file or nothing.

    Raises
    ------
    AdapterTwinError
        Unknown suffix, or a folder that cannot be written to.
    """
    path = Path(path)
    _require_suffix(path)
    with replacing(path) as temporary:
        if path.suffix == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            frame.to_parquet(temporary, index=False)
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, and move it onto `path` when the block succeeds.

    Raises
    ------
    AdapterTwinError
        The folder is missing or cannot be written to.
    """
    path = Path(path)
    folder = path.parent
    require(folder.is_dir(), f"{path}: the folder {folder} does not exist; create it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise AdapterTwinError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all; raises as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _require_suffix(path: Path) -> None:
    known = path.suffix in (".parquet", ".csv")
    require(known, f"{path}: unknown kind of table; name it .parquet or .csv")
