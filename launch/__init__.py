"""Renders and submits jobs. Imports neither jax nor rlhf_jax, so it runs on a bare login node."""
