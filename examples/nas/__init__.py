"""Neural architecture search with proximal optimizers, in layers: a package imports from those before it only.

    space     genotypes, search spaces, pictures of cells
    engine    settings, command line, loop over epochs, checkpoints, several processes, tables, curves, reports
    data      images and text
    nets      networks, a package for each deep learning library
    train     training of the network of a genotype
    bilevel   searches with network weights on training data and architecture weights on validation data
    methods   search methods, a file each

Everything is in PyTorch, unless it lies in a file or folder named `jax`, which is in JAX and does not import PyTorch, or is
shared: `space`, all files and folders named `settings`, what reads data (`cifar_files`, `image_files`, `image_sets`, `text`),
`bilevel.outcome`, and of `engine` the files command_line, console, loop, log, curves, report, results, bisection and selection
import neither of the two.
"""
