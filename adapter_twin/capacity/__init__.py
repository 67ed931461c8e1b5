"""The analytic model: steady states of one replica in microseconds, without a simulation."""
