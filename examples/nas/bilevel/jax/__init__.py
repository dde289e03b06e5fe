"""Bilevel searches in JAX."""
