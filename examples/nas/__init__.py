"""Neural architecture search with proximal optimizers, in layers: a package imports from those before it only.

    space     genotypes, search spaces, pictures of cells
    engine    settings, command line, loop over epochs, checkpoints, several processes, tables, curves, reports
    data      images and text
    nets      networks, a package for each deep learning library
    train     training of the network of a genotype
    bilevel   searches with network weights on training data and architecture weights on validation data
    methods   search methods, a file each

`space`, all files and folders named `settings`, and of `engine` the files command_line, log, curves, report, results and bisection do not
import PyTorch, so that networks of another library can use them.
"""
