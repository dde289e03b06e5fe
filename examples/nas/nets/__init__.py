"""Networks, by deep learning library."""
