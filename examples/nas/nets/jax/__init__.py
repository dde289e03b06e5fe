"""Networks in flax nnx."""
