"""Settings and presets of the search methods, the same whatever library computes the search."""
