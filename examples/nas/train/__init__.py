"""Training of the networks of genotypes from scratch."""
