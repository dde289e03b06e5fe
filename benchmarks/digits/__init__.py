"""The DIGITS ablation of SparseNAS, which `benchmarks/digits_ablation.py` runs.

`problem`   settings, curves, data, random draws and the measures of a network, in NumPy
`stages`    files of finished stages and of checkpoints
`report`    records, table and picture
`in_torch`  the trainings in torch
`in_jax`    the same trainings in JAX

The first three import neither torch nor JAX; the two trainings import them, and not each other.
"""
