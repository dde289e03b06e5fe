"""The libraries that compute a search: each has a registry of the methods that it offers, with the same names and settings."""

from __future__ import annotations

from types import ModuleType

from ..engine.command_line import CommandLine, errors_in_one_line

FRAMEWORKS = ("torch", "jax")


def registry_of(words: CommandLine) -> ModuleType:
    """Remove ``--framework NAME`` from a command line, and return the registry of that library.

    With ``--framework jax`` also ``--coordinator``, ``--processes`` and ``--process``, by which several hosts find each other. A
    registry has the tables CIFAR, ONE_STAGE and TEXT of methods by name, and the functions first_process, cifar_size and
    text_size.
    """
    if words.option("--framework", FRAMEWORKS, "torch") == "torch":
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
    with errors_in_one_line():
        of_jax.join_hosts(*(words.value(f"--{name}") for name in ("coordinator", "processes", "process")))
    return of_jax
