"""Interpretable models of the optimum, learnt from sweeps of the twin."""
