"""Bilevel searches in JAX: every step is one compiled function."""
