"""Lower bounds on the number of GPUs, proven for the oracle."""
