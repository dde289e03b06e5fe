"""What the NAS examples share: genotypes, spaces, networks, and pictures of cells."""
