"""Genotypes, search spaces, and pictures of them. Needs no deep learning library."""
