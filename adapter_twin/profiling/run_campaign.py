"""Run a campaign: piece by piece in random order, within a time budget, resumable after a kill."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pandas as pd

from adapter_twin.errors import AdapterTwinError
from adapter_twin.models import MODEL_CONFIGS
from adapter_twin.profiling.campaign import Campaign, load_campaign
from adapter_twin.profiling.machine import describe_machine, require_engine
from adapter_twin.profiling.micro import profile_engine
from adapter_twin.profiling.model_folder import (
    adapter_rank,
    check_model,
    write_adapters,
    write_model,
)
from adapter_twin.profiling.pieces import MicroPiece, ServingPiece, groups
from adapter_twin.profiling.run_tables import failed, kv_cache, run_id, run_row
from adapter_twin.profiling.server import Server, free_port
from adapter_twin.profiling.serving import measure_run
from adapter_twin.profiling.store import Store
from adapter_twin.work import Tell, quietly

UNMEASURED_S = {"micro": 60.0, "start": 45.0}
"""Taken for the time of a micro-profile and of a server's start until one was measured."""

SETTLING_S = 5.0
"""Beside its window, a serving run warms up, waits for an idle server and stores its tables."""


class BudgetSpent(Exception):
    """The next piece does not fit in what is left of the time budget."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What is there after a call.

    Attributes
    ----------
    campaign : str
    complete, pieces : int
        Pieces measured so far, in all calls, and those of the whole campaign.
    failed : dict of str to str
        Reason of each piece that failed; it is complete, with its reason as a row.
    rows : dict of str to int
        Rows of each table.
    stopped : str or None
        Why the call ended early.
    """

    campaign: str
    complete: int
    pieces: int
    failed: dict[str, str]
    rows: dict[str, int]
    stopped: str | None


def run_campaign(file: Path, out: Path, tell: Tell = quietly) -> Summary:
    """Measure what a campaign file asks and is not in `out` yet, and write the tables there.

    Parameters
    ----------
    file : pathlib.Path
        See `adapter_twin.profiling.campaign`.
    out : pathlib.Path
        Gets the tables of `adapter_twin.campaign_schemas`, ``campaign.yaml`` and ``machine.json``;
        a later call goes on from its ``pieces/``, and ``work/`` holds models, adapters and logs.
    tell : callable
        Told before and after every piece.

    Raises
    ------
    AdapterTwinError
        The campaign file is wrong, there is no engine, or `out` holds another campaign. What fails
        later, an engine's start or a run, is a row with its reason.
    KeyboardInterrupt
        Passed on once the tables of the complete pieces are written.
    """
    campaign = load_campaign(file)
    require_engine()
    store = Store(out)
    store.open(file, describe_machine(campaign.engine))
    todo, stopped = groups(campaign), None
    session = _Session(campaign, store, tell, sum(map(len, todo)))
    try:
        for group in todo:
            session.measure(group)
    except BudgetSpent as reason:
        stopped = str(reason)
    finally:
        rows = store.assemble()
    complete = store.complete()
    failures = {name: facts["failure"] for name, facts in complete.items() if facts["failure"]}
    return Summary(campaign.name, len(complete), session.total, failures, rows, stopped)


@dataclass(slots=True)
class _Session:
    """One call's work on a campaign."""

    campaign: Campaign
    store: Store
    tell: Tell
    total: int
    begun_s: float = field(default_factory=time.monotonic)

    def measure(self, group: Sequence[MicroPiece | ServingPiece]) -> None:
        """Measure what is missing of the pieces that share an engine."""
        complete = self.store.complete()
        left = [piece for piece in group if piece.piece_id not in complete]
        for piece in left:
            if isinstance(piece, MicroPiece):
                self._profile(piece)
        self._serve([piece for piece in left if isinstance(piece, ServingPiece)])

    def _profile(self, piece: MicroPiece) -> None:
        campaign, micro, flags = self.campaign, self.campaign.micro, piece.flags
        assert micro is not None
        slots = f"{flags.max_loras} slots of rank {flags.max_lora_rank}"
        self._begin(piece.piece_id, f"micro-profile, {slots}", self._longest_s("micro"))
        begun_s = time.monotonic()
        model = self._model()
        adapters = self._adapters(model, micro.adapter_ranks(), "micro")
        if flags.max_loras:
            # All of them in host memory, so that a swap within a step is one from there.
            fitting = sum(adapter_rank(folder) <= flags.max_lora_rank for folder in adapters)
            flags = replace(flags, max_cpu_loras=max(flags.max_cpu_loras, fitting))
        profile = profile_engine(
            model, adapters, flags, micro.plan, seed=campaign.seed + piece.index
        )
        names = {"engine_id": f"{campaign.name}/{piece.piece_id}", "model": campaign.model_name}
        tables = {
            "engine_starts": pd.DataFrame([names | profile.start]),
            "micro_steps": profile.steps.assign(**names),
            "adapter_loads": profile.loads.assign(**names),
        }
        failure = profile.start["server_failure"]
        self._end(piece.piece_id, tables, failure, micro=time.monotonic() - begun_s)

    def _serve(self, left: list[ServingPiece]) -> None:
        """Serve runs from one server, and what is left of them from a new one if it died."""
        while left:
            piece, start_s = left[0], self._longest_s("start")
            run = piece.run
            line = f"starting a server, {run.adapter_slots} slots, {run.served_adapters} adapters"
            self._begin(piece.piece_id, line, start_s + self._window_s())
            log = self.store.out / "work" / f"{piece.piece_id}.log"
            begun_s = time.monotonic()
            try:
                model = self._model()
                ranks = tuple(islice(cycle(run.ranks), run.served_adapters))
                folders = self._adapters(model, ranks, f"ranks-{'-'.join(map(str, run.ranks))}")
                adapters = {f"adapter-{i}": folder for i, folder in enumerate(folders)}
                with Server(model, adapters, piece.flags, free_port(), log) as server:
                    start_s = time.monotonic() - begun_s
                    while left and self._measure(left[0], server, start_s):
                        del left[0]
                    del left[:1]  # the run in which the server died
            except AdapterTwinError as error:  # the server did not start
                for piece in left:
                    self._end_run(piece, {"status": failed(str(error))})
                return

    def _measure(self, piece: ServingPiece, server: Server, start_s: float) -> bool:
        """Measure one run, and tell whether the server survived it."""
        campaign, run = self.campaign, piece.run
        assert campaign.serving is not None
        line = f"{run.served_adapters} adapters on {run.adapter_slots} slots at {run.rates} req/s"
        self._begin(piece.piece_id, line, self._window_s())
        try:
            memory = kv_cache(server.base_url)
            served = measure_run(
                server.base_url,
                server.model_name,
                campaign.trace(piece.index),
                campaign.serving.duration_s,
                list(server.adapters),
                check_model(server.model_folder)["vocab_size"],
                seed=campaign.run_seed(piece.index),
            )
        except (AdapterTwinError, OSError) as error:
            reason = server.failure() or str(error)
            self._end_run(piece, {"status": failed(reason)}, start=start_s)
            return server.failure() is None
        row = {**served.row, **memory}
        if served.failure is not None:
            row["status"] = failed(server.failure() or served.failure)
        names = {"run_id": run_id(campaign, piece.index, piece.repeat)}
        tables = {
            "requests": served.requests.assign(**names),
            "series": served.series.assign(**names),
        }
        self._end_run(piece, row, tables, start=start_s)
        return server.failure() is None

    def _end_run(
        self,
        piece: ServingPiece,
        measured: dict[str, Any],
        tables: dict[str, pd.DataFrame] | None = None,
        **took_s: float,
    ) -> None:
        row = run_row(self.campaign, piece.index, piece.repeat, piece.flags, measured)
        status = measured["status"]
        failure = None if status == "ok" else status.removeprefix("failed:")
        self._end(piece.piece_id, {"runs": row, **(tables or {})}, failure, **took_s)

    def _begin(self, piece_id: str, line: str, needed_s: float) -> None:
        """Announce a piece, or raise `BudgetSpent` if the budget has no room for it."""
        left_s = self.campaign.budget_s - (time.monotonic() - self.begun_s)
        if needed_s > left_s:
            raise BudgetSpent(
                f"budget_s: {max(left_s, 0):.0f} s are left of {self.campaign.budget_s:.0f} s and "
                f"{piece_id} needs about {needed_s:.0f} s; run it again to go on"
            )
        self.tell(len(self.store.complete()), self.total, f"{piece_id}: {line}")

    def _end(
        self,
        piece_id: str,
        tables: dict[str, pd.DataFrame],
        failure: str | None,
        **took_s: float,
    ) -> None:
        self.store.store(piece_id, tables, {"failure": failure, "took_s": took_s})
        ended = f"failed ({failure})" if failure else "measured"
        self.tell(len(self.store.complete()), self.total, f"{piece_id}: {ended}")

    def _longest_s(self, what: str) -> float:
        """Return the longest time that something took so far, in all calls."""
        took = (facts["took_s"] for facts in self.store.complete().values())
        return max((each[what] for each in took if what in each), default=UNMEASURED_S[what])

    def _window_s(self) -> float:
        assert self.campaign.serving is not None
        return self.campaign.serving.duration_s + SETTLING_S

    def _model(self) -> Path:
        name = self.campaign.model
        if name in MODEL_CONFIGS:
            return write_model(name, self.store.out / "work" / name)
        return Path(name)

    def _adapters(self, model: Path, ranks: Sequence[int], name: str) -> list[Path]:
        """Return an adapter of each rank: synthetic ones, or the first that fit of the given ones.

        Raises
        ------
        AdapterTwinError
            The given ones are too few.
        """
        if self.campaign.adapters is None:
            return write_adapters(model, self.store.out / "work" / "adapters" / name, ranks)
        by_rank: dict[int, list[Path]] = {}
        for folder in sorted(Path(self.campaign.adapters).iterdir()):
            if folder.is_dir():
                by_rank.setdefault(adapter_rank(folder), []).append(folder)
        chosen = []
        for rank in ranks:
            if not by_rank.get(rank):
                raise AdapterTwinError(
                    f"adapters: {ranks.count(rank)} of rank {rank} are needed, and "
                    f"{self.campaign.adapters} has fewer; add some or lower the campaign's numbers"
                )
            chosen.append(by_rank[rank].pop(0))
        return chosen
