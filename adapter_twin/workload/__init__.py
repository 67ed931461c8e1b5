"""Adapters, traffic, engine and SLO as asked, and the trace of requests drawn from them."""
