"""From records to figures: the service of a run, predictions and their errors."""
