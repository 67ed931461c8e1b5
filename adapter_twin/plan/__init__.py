"""Planning with the twin: sweeps, the optimum of a traffic mix, recommendations."""
