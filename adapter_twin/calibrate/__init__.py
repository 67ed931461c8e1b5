"""From measured tables to laws: every fit of a calibration."""
