"""Measurements of this project beside others; docs/benchmarks.md says how to run and read them."""
