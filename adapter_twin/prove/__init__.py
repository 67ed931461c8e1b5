"""Is a recommendation right? What to measure beside it, and how each choice did on a real engine.

`adapter_twin.prove.run_study` does the measuring.
"""
