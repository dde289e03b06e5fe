"""Checkpoints of trees of arrays with plain data, by Orbax. A process that is killed leaves the last complete checkpoint."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ..loop import first_sentence
from .devices import is_key

FOLDER = "checkpoint"
KEPT = 2  # the last one, and one more for the case that the disk damages it

logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file


class Checkpoints:
    """The checkpoints of a run in `out`/checkpoint, numbered by steps. All processes must call the methods."""

    def __init__(self, out: Path) -> None:
        self.folder = out.absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any, plain: dict[str, Any]) -> None:
        """Write a checkpoint, unless there is one of this step.

        state: a tree of arrays. plain: data of JSON.

        Raises OSError if the disk is full, after which the last checkpoints are complete.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), plain=ocp.args.JsonSave(plain))
        if step in self._manager.all_steps():
            return
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        if shutil.disk_usage(self.folder).free < sum(x.nbytes for x in jax.tree.leaves(state) if not is_key(x)):
            raise full  # before Orbax begins, whose threads report their own errors
        try:
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
        except Exception as error:
            for part in self.folder.glob(f"{step}.*tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            if str(full.strerror) in str(error):
                raise full from None  # Orbax hides it in an error of another class
            raise

    def plain(self) -> dict[str, Any]:
        """The plain data of the last checkpoint. ValueError if it is damaged."""
        return self._read(plain=ocp.args.JsonRestore())["plain"]

    def state(self, like: Any) -> Any:
        """The tree of the last checkpoint. ValueError if it is damaged, or of another structure than `like`.

        like: a tree with arrays of the same shapes and dtypes, on the same devices.
        """
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(like))
        found = self._read(state=ocp.args.StandardRestore(wanted))["state"]
        leaves = [_wrap(found[name], x) for name, x in zip(_named(like), jax.tree.leaves(like))]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        self._manager.close()

    def _read(self, **what: Any) -> Any:
        steps = sorted(self._manager.all_steps())
        try:
            return self._manager.restore(steps[-1], args=ocp.args.Composite(**what))
        except Exception as error:
            older = f"; without {steps[-1]} in it, the run continues from {steps[-2]}" if len(steps) > 1 else ""
            reason = first_sentence(error)
            raise ValueError(
                f"{self.folder} must contain a complete checkpoint, but could not be read{older}: {reason}"
            ) from None


def _named(tree: Any) -> dict[str, jax.Array]:
    """The leaves by their paths, random keys as the numbers in them."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): jax.random.key_data(x) if is_key(x) else x for path, x in found}


def _wrap(found: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(found) if is_key(like) else found
