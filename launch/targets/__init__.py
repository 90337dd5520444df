"""Where jobs can go: one module each, with `render(job) -> Plan`."""
