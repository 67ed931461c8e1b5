"""Measure a real vLLM: model folders, micro-profiles, serving runs and whole campaigns.

The one package that may import vllm or torch, and it does so late: importing it needs neither.
"""
