"""Proofs: recommendations and their rivals, measured on a real engine and judged.

`adapter_twin.prove.run_study` does the measuring; `adapter_twin.prove.watch` looks at a server
that others use.
"""
