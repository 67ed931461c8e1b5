"""The digital twin: vLLM's scheduling policy, driven by measured laws."""
