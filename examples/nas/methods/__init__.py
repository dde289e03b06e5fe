"""Search methods: a module for each, with its settings, and the registry of all of them for the scripts."""
