"""Training of networks from genotypes."""
