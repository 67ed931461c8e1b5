"""Measured tables -> `Calibration`: the laws of one model on one GPU and engine version."""

from adapter_twin.laws.calibration import (
    Calibration,
    list_calibrations,
    load_calibration,
)

__all__ = ["Calibration", "list_calibrations", "load_calibration"]
