"""Campaigns, run piece by piece in random order: within a time budget, resumable after a kill."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adapter_twin.errors import AdapterTwinError, one_line, require
from adapter_twin.measure.campaign import load_campaign
from adapter_twin.measure.engine_flags import describe_machine, require_engine
from adapter_twin.measure.micro import profile_engine, start_row
from adapter_twin.measure.model_folder import adapter_rank, write_adapters, write_model
from adapter_twin.measure.pieces import MicroPiece, Piece, ServingPiece, groups
from adapter_twin.measure.scrape import kv_cache
from adapter_twin.measure.serving import measure_run
from adapter_twin.measure.store import Store, Summary, check_tables
from adapter_twin.measure.vllm_server import Server, free_port
from adapter_twin.tables.campaign_schemas import CAMPAIGN_RUNS
from adapter_twin.workload.models import model_config, shipped_models

log = logging.getLogger(__name__)

UNMEASURED_S = {"micro": 60.0, "start": 45.0}
"""A micro-profile and a server's start are taken to need this time until one was measured."""

SETTLING_S = 5.0
"""Beside its window, a serving run warms up, waits for an idle server and stores its tables."""


def run_campaign(file: Path, out: Path) -> Summary:
    """Measure what a campaign file asks and is not in `out` yet, and write the tables there.

    Parameters
    ----------
    file : pathlib.Path
        See `adapter_twin.measure.campaign`.
    out : pathlib.Path
        Gets the tables of `adapter_twin.tables.campaign_schemas`, ``campaign.yaml`` and
        ``machine.json``; a later call goes on from its ``pieces/``, and ``work/`` holds models,
        adapters and logs.

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
    machine = describe_machine(campaign.engine) | {"model_config": model_config(campaign.model)}
    store.open(file.read_text(encoding="utf-8"), machine, file)
    session = WorkSession(
        campaign.name, campaign.model, campaign.adapters, campaign.budget_s, store
    )
    return session.measure(groups(campaign.pieces(), campaign.seed))


class BudgetSpent(Exception):
    """The next piece does not fit in what is left of the time budget."""


@dataclass(slots=True)
class WorkSession:
    """One call's work.

    Attributes
    ----------
    name : str
        Of the campaign or study.
    model : str
        A shape, or the path of a model folder.
    adapters : str, optional
        Folder of PEFT adapters; left out, synthetic ones are written.
    budget_s : float
        Time for this call.
    store : Store
    """

    name: str
    model: str
    adapters: str | None
    budget_s: float
    store: Store
    total: int = field(default=0, init=False)
    begun_s: float = field(default_factory=time.monotonic, init=False)

    def measure(self, grouped: Sequence[Sequence[Piece]]) -> Summary:
        """Measure what is missing of the pieces, those of a group with one engine.

        Raises
        ------
        KeyboardInterrupt
            Passed on once the tables of the complete pieces are written.
        """
        self.total, stopped = sum(map(len, grouped)), None
        try:
            for group in grouped:
                complete = self.store.complete()
                left = [piece for piece in group if piece.piece_id not in complete]
                for piece in left:
                    if isinstance(piece, MicroPiece):
                        self._profile(piece)
                self._serve([piece for piece in left if isinstance(piece, ServingPiece)])
        except BudgetSpent as reason:
            stopped = str(reason)
        finally:
            rows = self.store.assemble()
        complete = self.store.complete()
        failed, doubtful = (
            {name: facts[why] for name, facts in complete.items() if facts.get(why)}
            for why in ("failure", "doubt")
        )
        return Summary(self.name, len(complete), self.total, failed, doubtful, rows, stopped)

    def _profile(self, piece: MicroPiece) -> None:
        flags = piece.flags
        slots = f"{flags.max_loras} slots of rank {flags.max_lora_rank}"
        self._begin(piece.piece_id, f"micro-profile, {slots}", self._longest_s("micro"))
        begun_s = time.monotonic()
        model = self._model()
        adapters = self._adapters(model, piece.adapter_ranks)
        if flags.max_loras:
            # All of them in host memory, so that a swap within a step is one from there.
            fitting = sum(adapter_rank(folder) <= flags.max_lora_rank for folder in adapters)
            flags = replace(flags, max_cpu_loras=max(flags.max_cpu_loras, fitting))
        profile = profile_engine(model, adapters, flags, piece.plan, seed=piece.seed)
        names = {"engine_id": f"{self.name}/{piece.piece_id}", "model": model.name}
        tables = {name: table.assign(**names) for name, table in profile.items()}
        try:
            check_tables(tables)
        except AdapterTwinError as error:  # a table that breaks its schema would stop every call
            tables = {"engine_starts": start_row(flags, str(error)).assign(**names)}
            check_tables(tables)
        failure = tables["engine_starts"].server_failure.item()
        self._end(piece.piece_id, tables, failure, None, micro=time.monotonic() - begun_s)

    def _serve(self, left: list[ServingPiece]) -> None:
        """Serve runs from one server, and what is left of them from a new one if one went wrong."""
        while left:
            piece, start_s = left[0], self._longest_s("start")
            line = f"starting a server, {_adapters_on_slots(piece)}"
            self._begin(piece.piece_id, line, start_s + _window_s(piece))
            log = self.store.out / "work" / f"{piece.piece_id}.log"
            begun_s = time.monotonic()
            try:
                model = self._model()
                folders = self._adapters(model, piece.adapter_ranks)
                names = (adapter.name for adapter in piece.workload.adapters)
                adapters = dict(zip(names, folders, strict=True))
                with Server(model, adapters, piece.flags, free_port(), log) as server:
                    start_s = time.monotonic() - begun_s
                    while left and self._measure(left[0], server, start_s):
                        del left[0]
                    del left[:1]  # the run that went wrong
            except (AdapterTwinError, OSError) as error:  # the server did not start
                for piece in left:
                    self._end_run(piece, {}, str(error))
                return

    def _measure(self, piece: ServingPiece, server: Server, start_s: float) -> bool:
        """Measure one run, and tell whether its server is good for another."""
        workload = piece.workload
        line = f"{_adapters_on_slots(piece)}, {workload.offered_request_rate:.3g} requests/s in all"
        self._begin(piece.piece_id, line, _window_s(piece))
        try:
            memory = kv_cache(server.base_url)
            served = measure_run(server, piece.trace(), workload.duration_s, seed=piece.seed)
        except Exception as error:  # whatever a server does costs its run, not the campaign
            known = isinstance(error, AdapterTwinError | OSError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            self._end_run(piece, {}, server.failure() or reason, start=start_s)
            return False
        failure = server.failure() or served.failure
        frames = {"requests": served.requests, "series": served.series}
        tables = {name: frame.assign(run_id=piece.run_id) for name, frame in frames.items()}
        row = served.row | memory
        return self._end_run(piece, row, failure, served.doubt, tables, start=start_s) == "ok"

    def _end_run(
        self,
        piece: ServingPiece,
        measured: Mapping[str, Any],
        failure: str | None,
        doubt: str | None = None,
        tables: Mapping[str, pd.DataFrame] | None = None,
        **took_s: float,
    ) -> str:
        """Keep a run and return its status; what was known before wins over what was measured."""
        status = "ok"
        if failure is not None:
            failure, doubt = one_line(failure or "no reason given"), None
            status = f"failed:{failure}"
        elif doubt is not None:
            doubt = one_line(doubt)
            status = f"doubtful:{doubt}"
        row = {
            **dict.fromkeys(CAMPAIGN_RUNS.columns, np.nan),
            "sent_is_exact": True,
            "client_collapsed": False,
            "duration_s": piece.workload.duration_s,
            "status": status,
            **measured,
            **piece.columns(),
        }
        tables = {"runs": pd.DataFrame([row]), **(tables or {})}
        try:
            check_tables(tables)
        except AdapterTwinError as error:  # a table that breaks its schema would stop every call
            require(bool(measured), str(error))
            return self._end_run(piece, {}, str(error), None, None, **took_s)
        self._end(piece.piece_id, tables, failure, doubt, **took_s)
        return status

    def _begin(self, piece_id: str, line: str, needed_s: float) -> None:
        """Announce a piece, or raise `BudgetSpent` if the budget has no room for it."""
        left_s = self.budget_s - (time.monotonic() - self.begun_s)
        if needed_s > left_s:
            raise BudgetSpent(
                f"budget_s: {max(left_s, 0):.0f} s are left of {self.budget_s:.0f} s and "
                f"{piece_id} needs about {needed_s:.0f} s; run it again to go on"
            )
        self._say(f"{piece_id}: {line}")

    def _end(
        self,
        piece_id: str,
        tables: Mapping[str, pd.DataFrame],
        failure: str | None,
        doubt: str | None,
        **took_s: float,
    ) -> None:
        facts = {"failure": failure, "doubt": doubt, "took_s": took_s}
        self.store.store(piece_id, tables, facts)
        ended = f"failed ({failure})" if failure else f"doubtful ({doubt})" if doubt else "measured"
        self._say(f"{piece_id}: {ended}")

    def _say(self, line: str) -> None:
        log.info("%d/%d %s", len(self.store.complete()), self.total, line)

    def _longest_s(self, what: str) -> float:
        """Return the longest time that something took so far, in all calls."""
        took = (facts["took_s"] for facts in self.store.complete().values())
        return max((each[what] for each in took if what in each), default=UNMEASURED_S[what])

    def _model(self) -> Path:
        if self.model in shipped_models():
            return write_model(self.model, self.store.out / "work" / self.model)
        return Path(self.model)

    def _adapters(self, model: Path, ranks: Sequence[int]) -> list[Path]:
        """Return an adapter of each rank: synthetic ones, or the first that fit of the given ones.

        Raises
        ------
        AdapterTwinError
            The given ones are too few.
        """
        if self.adapters is None:
            # Every list of ranks has a folder of its own: adapter i may be of another rank in each.
            name = hashlib.sha256(repr(tuple(ranks)).encode()).hexdigest()[:8]
            return write_adapters(model, self.store.out / "work" / "adapters" / name, ranks)
        own = [folder for folder in sorted(Path(self.adapters).iterdir()) if folder.is_dir()]
        of_rank = {rank: [f for f in own if adapter_rank(f) == rank] for rank in set(ranks)}
        for rank, needed in Counter(ranks).items():
            require(
                needed <= len(of_rank[rank]),
                f"adapters: {needed} of rank {rank} are needed, and {self.adapters} has fewer; "
                "add some or ask for fewer",
            )
        return [of_rank[rank].pop(0) for rank in ranks]


def _adapters_on_slots(piece: ServingPiece) -> str:
    return f"{len(piece.adapter_ranks)} adapters on {piece.flags.max_loras} slots"


def _window_s(piece: ServingPiece) -> float:
    return piece.workload.duration_s + SETTLING_S
