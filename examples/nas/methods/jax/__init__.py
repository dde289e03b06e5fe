"""Search methods in JAX, a file each."""
