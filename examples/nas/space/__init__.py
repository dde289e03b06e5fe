"""Genotypes, search spaces, and drawings of them. Independent of any deep learning library."""
