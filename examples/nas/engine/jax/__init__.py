"""Devices, checkpoints and the loop in JAX."""
