"""Long work: how far it is, and which machines do it."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import joblib

from adapter_twin.errors import AdapterTwinError

T = TypeVar("T")

CONNECT_S = 10.0
LINE_EVERY_S = 5.0
"""A log gets a line about long work no more often than that."""

log = logging.getLogger(__name__)


def track(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterator[T]:
    """Pass items on and show how many are done: a bar on a terminal, now and then a line in a log.

    Parameters
    ----------
    items : iterable
    what : str
        The work.
    total, done : int
        Items in all, and those that were done before.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import track as bar

        yield from bar(items, escape(what), total, done, console=Console(stderr=True))
        return
    told_s = time.monotonic()
    for number, item in enumerate(items, done + 1):
        yield item
        if time.monotonic() > told_s + LINE_EVERY_S:
            told_s = time.monotonic()
            log.info("%d/%d %s", number, total, what)


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
