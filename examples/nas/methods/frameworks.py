"""The libraries that compute a search: each has a registry of the methods that it offers, with the same names and settings."""

from __future__ import annotations

from types import ModuleType

from ..engine.command_line import CommandLine, errors_in_one_line

FRAMEWORKS = ("torch", "jax")
HOSTS = {  # options of runs on several hosts: help and metavar
    "--coordinator": (
        "With --framework jax on several hosts: address of process 0, or auto where JAX finds it (Cloud TPU, Slurm).",
        "HOST:PORT",
    ),
    "--processes": ("Number of processes of such a run; not with --coordinator auto.", "N"),
    "--process": ("Number of this process, from 0; not with --coordinator auto.", "I"),
}


def registry_of(words: CommandLine) -> ModuleType:
    """Remove ``--framework NAME`` from a command line, and return the registry of that library.

    With ``--framework jax`` also ``--coordinator``, ``--processes`` and ``--process``, by which several hosts find each other. A
    registry has the tables CIFAR, ONE_STAGE and TEXT of methods by name, and the functions first_process, cifar_size and
    text_size.
    """
    framework = words.option("--framework", FRAMEWORKS, "torch", "Library that computes the search.")
    hosts = {name: words.value(name, text, metavar) for name, (text, metavar) in HOSTS.items()}
    if framework == "torch":
        given = [name for name, value in hosts.items() if value is not None]
        if given:
            raise SystemExit(f"error: {given[0]} belongs to --framework jax; in PyTorch torchrun starts several processes")
        try:
            from . import registry
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"error: --framework torch needs PyTorch ({error.name} is missing): install it, or search with --framework jax"
            ) from None
        return registry
    try:
        from .jax import registry as of_jax
    except ModuleNotFoundError as error:
        raise SystemExit(
            f'error: --framework jax needs JAX, flax and Orbax ({error.name} is missing): pip install -e ".[jax,examples]"'
        ) from None
    if not words.help_requested:  # joining waits for the other hosts
        with errors_in_one_line():
            of_jax.join_hosts(*hosts.values())
    return of_jax
