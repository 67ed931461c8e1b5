"""Measured tables: where they lie, what their columns mean, and how they are read."""
