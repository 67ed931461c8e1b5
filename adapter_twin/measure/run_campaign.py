"""Run a campaign: piece by piece in random order, within a time budget, resumable after a kill."""

from __future__ import annotations

from pathlib import Path

from adapter_twin.measure.campaign import load_campaign
from adapter_twin.measure.machine import describe_machine, require_engine
from adapter_twin.measure.pieces import groups
from adapter_twin.measure.store import Store
from adapter_twin.measure.work_session import Summary, WorkSession


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
    store.open(file.read_text(encoding="utf-8"), describe_machine(campaign.engine), file)
    session = WorkSession(
        name=campaign.name,
        model=campaign.model,
        adapters=campaign.adapters,
        budget_s=campaign.budget_s,
        store=store,
    )
    return session.measure(groups(campaign))
