"""Work in processes: how many there may be, and that they end with the process that asked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest

from adapter_twin.errors import AdapterTwinError
from adapter_twin.parallel import check_jobs, share_out

OWNER = """\
import os, time
from joblib import delayed
from adapter_twin.parallel import share_out

def work(number):
    print(os.getpid(), flush=True)
    time.sleep(600)

share_out((delayed(work)(number) for number in range(2)), 2)
"""


def processes_of(group: int) -> list[int]:
    """Return the processes of a session that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # gone
            continue
        if told[0] != "Z" and int(told[3]) == group:
            found.append(int(folder.name))
    return found


def test_what_is_shared_out_comes_back_in_order() -> None:
    tasks = (joblib.delayed(pow)(number, 2) for number in range(3))
    assert share_out(tasks, 2) == [0, 1, 4]


@pytest.mark.parametrize("jobs", [0, -2, 10**6])
def test_a_number_of_processes_that_cannot_be_is_refused(jobs: int) -> None:
    with pytest.raises(
        AdapterTwinError, match=r"jobs: must be -1 \(all cores\) or from 1 to 1,024"
    ):
        check_jobs(jobs)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_a_process_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as owner:
        assert owner.stdout is not None
        workers = {int(owner.stdout.readline()) for _ in range(2)}
        assert workers <= set(processes_of(owner.pid)) - {owner.pid}
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        limit_s = time.monotonic() + 10
        while (left := processes_of(owner.pid)) and time.monotonic() < limit_s:
            time.sleep(0.1)
    assert not left
