"""Folders of campaigns: a subfolder per measured piece, there whole or not at all."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.tables.campaign_schemas import CAMPAIGN_TABLES
from adapter_twin.tables.datasets import write_table, write_text
from adapter_twin.tables.schemas import validate
from adapter_twin.workload.files import read_yaml

COPY = "campaign.yaml"
MACHINE = "machine.json"
_FACTS = "facts.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """State of a campaign or a study after a call.

    Attributes
    ----------
    campaign : str
    complete, pieces : int
        Pieces measured so far, in all calls, and those of the whole campaign.
    failed : dict of str to str
        Reason of each piece that failed; it is complete, with its reason as a row.
    doubtful : dict of str to str
        Likewise of each that is not to be trusted.
    rows : dict of str to int
        Rows of each table.
    stopped : str or None
        Why the call ended early.
    """

    campaign: str
    complete: int
    pieces: int
    failed: dict[str, str]
    doubtful: dict[str, str]
    rows: dict[str, int]
    stopped: str | None


@dataclass(frozen=True, slots=True)
class Store:
    """The folder of a campaign.

    Attributes
    ----------
    out : pathlib.Path
        The tables lie here, and each piece's in ``pieces/<piece_id>/``.
    """

    out: Path

    def open(self, asked: str, machine: Mapping[str, Any], file: Path) -> None:
        """Make the folder ready for a campaign, or refuse to mix two campaigns in it.

        Parameters
        ----------
        asked : str
            What is to be measured, as YAML; kept as ``campaign.yaml``.
        machine : mapping
            See `adapter_twin.measure.engine_flags.describe_machine`.
        file : pathlib.Path
            Where `asked` comes from, for messages.

        Raises
        ------
        AdapterTwinError
            The folder holds another campaign, or one that another machine or engine measured.
        """
        copy, described = self.out / COPY, self.out / MACHINE
        for name in ("pieces", "work"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        for left in (self.out / "pieces").glob(".*.tmp"):  # by a kill
            shutil.rmtree(left)
        if copy.is_file():
            require(
                _measures(read_yaml(copy)) == _measures(yaml.safe_load(asked)),
                f"{self.out}: holds another campaign than {file}; give another folder",
            )
        if described.is_file():
            before = json.loads(described.read_text(encoding="utf-8"))
            for part in ("device", "vllm"):
                require(
                    before.get(part) == machine.get(part),
                    f"{self.out}: was measured with {part} {before.get(part)}, this is "
                    f"{machine.get(part)}; give another folder",
                )
        write_text(copy, asked)
        write_text(described, json.dumps(machine, indent=2) + "\n")

    def complete(self) -> dict[str, dict[str, Any]]:
        """Return the facts of each complete piece by its id."""
        found = sorted((self.out / "pieces").glob(f"*/{_FACTS}"))
        return {path.parent.name: json.loads(path.read_text("utf-8")) for path in found}

    def store(
        self, piece_id: str, tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any]
    ) -> None:
        """Keep a piece's tables (by name) and facts.

        Parameters
        ----------
        piece_id : str
        tables : mapping of str to pandas.DataFrame
        facts : mapping
            Plain values, kept as JSON.
        """
        folder = self.out / "pieces" / piece_id
        partial = folder.with_name(f".{piece_id}.tmp")
        try:
            partial.mkdir()
            for name, table in tables.items():
                write_table(table, partial / f"{name}.parquet")
            (partial / _FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
            partial.rename(folder)
        except OSError as error:
            raise AdapterTwinError(f"{folder}: cannot be written ({error.strerror})") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def assemble(self) -> dict[str, int]:
        """Join the pieces' tables, write them, and return the number of rows of each.

        Raises
        ------
        AdapterTwinError
            A table breaks its schema.
        """
        rows = {}
        for name, schema in CAMPAIGN_TABLES.items():
            target = self.out / f"{name}.parquet"
            paths = sorted((self.out / "pieces").glob(f"*/{name}.parquet"))
            frames = [frame for frame in map(pd.read_parquet, paths) if len(frame)]
            if frames:
                table = validate(pd.concat(frames, ignore_index=True), schema, target)
                write_table(table[list(dict.fromkeys([*schema.columns, *table]))], target)
                rows[name] = len(table)
        return rows


def check_tables(tables: Mapping[str, pd.DataFrame]) -> None:
    """Raise `AdapterTwinError` if a piece's table breaks its schema, before it is kept."""
    for name, table in tables.items():
        if len(table):
            validate(table, CAMPAIGN_TABLES[name], name)


def _measures(campaign: Mapping[str, Any]) -> str:
    """Return what a campaign file measures as text: all but its time budget."""
    return yaml.safe_dump({key: value for key, value in campaign.items() if key != "budget_s"})
