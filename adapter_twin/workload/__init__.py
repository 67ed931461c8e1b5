"""What is asked: adapters, traffic, engine and SLO, and the trace of requests drawn from them."""
