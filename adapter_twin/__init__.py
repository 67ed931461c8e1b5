"""A digital twin of a GPU that serves many LoRA adapters with vLLM.

From a workload and an engine configuration to the service they would get: throughput, latency,
starvation; and from there to how many adapters one GPU takes and how many slots to give them.
"""

from importlib.metadata import version

__version__ = version("adapter-twin")
