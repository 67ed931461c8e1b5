"""Long work: who is told how far it is, and which machines do it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import joblib

from adapter_twin.errors import AdapterTwinError

Tell = Callable[[int, int, str], None]
"""Takes how much is done, of how much, and what is going on."""

CONNECT_S = 10.0


def quietly(done: int, total: int, text: str) -> None:
    """Tell nobody."""


@contextmanager
def workers(scheduler: str | None) -> Iterator[None]:
    """Have `joblib.Parallel` send work to a Dask cluster, or else to the cores of this machine.

    Parameters
    ----------
    scheduler : str, optional
        Address of a Dask scheduler, ``tcp://host:port``.

    Raises
    ------
    AdapterTwinError
        Dask is not installed, or the scheduler cannot be reached.
    """
    if scheduler is None:
        with warnings.catch_warnings():
            # joblib replaces a process that has grown, and warns; no work is lost.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise AdapterTwinError(
            "scheduler: needs Dask; pip install 'adapter-twin[distributed]'"
        ) from None
    try:
        client: Any = Client(scheduler, timeout=CONNECT_S)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AdapterTwinError(
            f"scheduler: {scheduler} cannot be reached ({reason}); start dask scheduler there"
        ) from None
    with client, joblib.parallel_config("dask", client=client):
        yield
