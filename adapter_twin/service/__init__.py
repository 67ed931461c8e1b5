"""The service of a run, predictions for a table of runs, and their errors."""
