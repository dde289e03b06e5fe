"""Supernets, evaluation networks and their operations in PyTorch."""
