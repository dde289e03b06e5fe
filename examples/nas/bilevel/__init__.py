"""Searches on two levels: network weights on training data, architecture on validation data."""
