"""Bilevel searches: network weights are trained on training data, architecture weights on validation data."""
