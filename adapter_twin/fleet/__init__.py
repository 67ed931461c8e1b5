"""Fleets of replicas: placements of adapters on GPUs, their lower bound, and the cluster twin."""
