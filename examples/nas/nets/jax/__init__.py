"""Networks of cells in JAX: flax nnx modules for images (N, H, W, C)."""
