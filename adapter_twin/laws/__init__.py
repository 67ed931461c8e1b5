"""Measured tables -> `Calibration`: the laws of one model on one GPU and engine version."""

from adapter_twin.laws.calibration import Calibration
from adapter_twin.laws.find import load_calibration
from adapter_twin.workload.calibration_files import list_calibrations

__all__ = ["Calibration", "list_calibrations", "load_calibration"]
