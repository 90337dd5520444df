"""RLHF in JAX: losses, train steps, sampling and the host loop around them."""

__version__ = "0.1.0"
