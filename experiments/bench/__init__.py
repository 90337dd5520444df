"""Benchmarks: seconds, memory and compiles of what the scripts run, also beside other libraries."""
