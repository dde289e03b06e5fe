r"""
The prox of every family
========================

A proximal operator with one number, and with two: where it is zero, and how it moves the rest.
"""
