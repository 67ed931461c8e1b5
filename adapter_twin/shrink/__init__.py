"""Fewer and smaller adapters before more GPUs: what weights keep at a lower rank, or merged."""
