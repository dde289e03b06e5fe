"""Data sets: CIFAR, folders of images, and text."""
