"""Search methods, a file each with its settings, and the registry that the scripts choose from."""
