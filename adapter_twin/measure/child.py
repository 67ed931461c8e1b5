"""Child processes that end with this one, and take along whatever they have started."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_GUARD = """\
import os, sys
told = sys.stdin.buffer.read()
if told:
    os.killpg(int(told), 9)
"""


class Child(subprocess.Popen[bytes]):
    """A command in a session of its own, all of which ends with this process.

    A guard, a second child, waits for its input to close, which it does when this process ends in
    any way, and then kills the session. That reaches processes that are stopped (SIGSTOP), too,
    which could not watch for themselves. Linux's ``PR_SET_PDEATHSIG`` would reach the command alone
    and none that it started, and would come when the *thread* ends that started it.

    Parameters
    ----------
    command : sequence of str
    variables : mapping of str to str
        Environment variables on top of the present ones.
    log : pathlib.Path
        Keeps what the command prints; overwritten.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        session: dict[str, Any] = {"start_new_session": True}
        with log.open("wb") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **session,
            )
            super().__init__(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables},
                **session,
            )
        assert self._guard.stdin is not None
        self._guard.stdin.write(b"%d" % self.pid)
        self._guard.stdin.flush()

    def kill_session(self) -> None:
        """Kill what is left of the session, and wait for the command itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._guard.kill()  # before the number of the session is free for another
        self._guard.communicate()
        self.wait()
