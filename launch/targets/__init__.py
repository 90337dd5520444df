"""Targets of jobs: one module each, with `render(job) -> Plan`."""
