"""Proofs: recommendations and their rivals, measured on a real engine and judged.

`adapter_twin.prove.run_study` does the measuring.
"""
