"""Long work: how far it is, and which processes or machines do it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import joblib

from adapter_twin.errors import AdapterTwinError, require

T = TypeVar("T")

CONNECT_S = 10.0
LINE_EVERY_S = 5.0
"""A log gets a line about long work no more often than that."""

MOST_JOBS = 1024
WATCH_EVERY_S = 1.0
"""A worker looks that often whether the process that it works for is still there."""

log = logging.getLogger(__name__)


def check_jobs(jobs: int) -> int:
    """Return a number of processes; raise `AdapterTwinError` where it is none."""
    fits = jobs == -1 or 1 <= jobs <= MOST_JOBS
    require(fits, f"jobs: must be -1 (all cores) or from 1 to {MOST_JOBS:,}, got {jobs}")
    return jobs


def share_out(
    tasks: Iterable[Any],
    jobs: int,
    return_as: Literal["list", "generator", "generator_unordered"] = "list",
) -> Any:
    """Do tasks in processes that end with this one, or where `workers` says.

    Parameters
    ----------
    tasks : iterable
        Calls, as `joblib.delayed` makes them.
    jobs : int
        Processes; -1 is one per core.
    return_as : str
        As `joblib.Parallel` takes it.
    """
    ends = {"initializer": _end_with, "initargs": (os.getpid(),)}
    return joblib.Parallel(check_jobs(jobs), return_as=return_as, **ends)(tasks)


def _end_with(parent: int) -> None:
    """Kill this process once its parent is gone, also where that was killed outright.

    A thread watches. Linux's ``PR_SET_PDEATHSIG`` would end a worker with the *thread* that started
    it, and workers outlive threads.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_EVERY_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


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
