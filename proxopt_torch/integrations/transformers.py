"""``ProximalTrainerCallback``: an optimizer of proxopt_torch in the ``Trainer`` of transformers.

It needs ``transformers`` and ``accelerate``: ``pip install "proxopt[trainers]"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        'proxopt_torch.integrations.transformers needs transformers: pip install "proxopt[trainers]"', name="transformers"
    ) from error

from proxopt_torch.integrations._sparse_training import SparseTraining

__all__ = ["ProximalTrainerCallback"]


class ProximalTrainerCallback(SparseTraining, TrainerCallback, ExportableState):
    """Save the sparse model, follow a budget, log the zeros, and compact the model at the end of ``Trainer.train()``.

    The ``Trainer`` itself calls ``optimizer.eval()`` before an evaluation and ``optimizer.train()`` before a training step, so
    that metrics are those of the sparse prox point. With the callback

    - while ``train()`` runs, and in all its checkpoints, also with ``save_only_model=True``, the weights are those of the prox
      point. A checkpoint holds the search point beside them, and ``train(resume_from_checkpoint=...)`` continues bit for bit, the
      budget included;
    - after ``train()`` the model is at the prox point: of the last update, or of the best checkpoint with
      ``load_best_model_at_end=True``. An error or Ctrl-C in it is no event of the ``Trainer``: call
      ``callback.optimizer.eval()`` then, before the model is used in another way.

    Each log entry gets these values: ``zero_share``, the share of zero entries in the parameters of the optimizer;
    ``living_groups``, the share of the groups of its penalties that are not zero; ``budget_share``, ``budget_wanted`` and
    ``budget_strength``, as in ``BudgetRecord``. They are in ``trainer.state.log_history`` and on the terminal. TensorBoard and
    other reporters get them too after ``callback.attach(trainer)``.

    The budget is stored in ``trainer_state.json``, and is restored without
    ``TrainingArguments(restore_callback_states_from_checkpoint=True)``. That option is refused, for it would replace the callback
    by one without arguments.

    Args:
      budget: the arguments of ``Budget`` as a dict, e.g. ``{"macs": 0.5}``; or a function of the optimizer, the network, the
        example inputs and the number of updates (None where the trainer does not know it), which returns a ``Budget`` or a
        ``StrengthPath``. Its ``step()`` is called after each update. ``steps`` is the number of updates of the training
        unless the dict has it, and ``every`` is such that 200 measurements are made.
      network: the name of the submodule to measure and to compact; the whole model by default.
      example_inputs: the arguments of ``network(...)``; by default, for the whole model, the first two members of the training
        set without their labels, as the collator gives them.
      compact: compact the network at the end. A dict holds arguments of ``compact``, e.g. ``{"tolerance": 1e-3}``.
      save_compact: a file for the state_dict of the compact network; ``load_compact`` reads it.

    Attributes:
      optimizer: that of the training, of proxopt_torch.
      budget: what ``budget`` has made; None without it.
      report: the last ``SparsityReport``.
      compacted: the result of ``compact``, from the end of a training on.

    Raises:
      TypeError: an argument of the wrong type, or another optimizer than one of proxopt_torch.
      ValueError: when the training starts: an optimizer without penalty; no example inputs where they are needed; a network that
        does not exist; sharded parameters that are to be compacted; ``restore_callback_states_from_checkpoint=True``; no budget
        although the checkpoint holds the state of one.

    >>> from proxopt_torch.integrations.transformers import ProximalTrainerCallback
    >>> callback = ProximalTrainerCallback(budget={"macs": 0.5}, compact={"tolerance": 1e-3}, save_compact="small.pt")
    >>> ProximalTrainerCallback(budget=0.5)
    Traceback (most recent call last):
    ...
    TypeError: budget must be a dict of arguments of Budget, a function that makes one, or None, got 0.5
    """

    _example_hint = "pass example_inputs, since there is no default for a submodule or a training set without indices"

    def attach(self, trainer: Trainer) -> None:
        """Put the callback before all others of the trainer, so that reporters which are callbacks, too, log its values."""
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]

    # -- a training ---------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        train_dataloader: DataLoader[Any],
        **kwargs: Any,
    ) -> None:
        """Make the budget. A checkpoint was loaded before this."""
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint must be False with ProximalTrainerCallback, since a checkpoint does not "
                "hold its arguments, got True; the state of the budget is restored without it"
            )
        self._forget()
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self._restore(_saved_state(stored))
        example = None
        if self._given_example is None and not self._network:
            example = _first_members(train_dataloader)
        done = 0 if self._saved else state.global_step  # of a training without a budget
        self._begin(model, [optimizer], example, state.max_steps - done)
        self._train()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the search point into the model, also for a ``training_step`` of the user that does not."""
        self._train()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the budget act after an update."""
        self._update()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the prox point into the model.

        The last event before ``load_best_model_at_end`` acts. Otherwise ``optimizer.eval()`` of a later evaluation would replace
        the weights of the best checkpoint.
        """
        assert self.optimizer is not None
        self.optimizer.eval()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Add the report to the entry."""
        if self._running:
            found = self._report_metrics() | self._budget_metrics()
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Leave the model at the prox point, and compact it."""
        self._end(model, write=state.is_world_process_zero)

    # -- checkpoints --------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` holds of the callback."""
        return {"args": {}, "attributes": {"saved": _encoded(self._state())}}

    # -- parts --------------------------------------------------------------------------------

    def _train(self) -> None:
        assert self.optimizer is not None
        self.optimizer.train()


def _first_members(loader: DataLoader[Any]) -> Any:
    """A batch without labels; None if the data set has no indices. No sampler is asked, which would move its random state."""
    data: Any = loader.dataset
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return None
    with torch.random.fork_rng():
        batch = loader.collate_fn([data[i] for i in range(min(2, len(data)))])
    return {k: v for k, v in batch.items() if "label" not in k} if isinstance(batch, Mapping) else None


def _saved_state(stored: Any) -> dict[str, Any]:
    """The state of the callback in ``trainer_state.json``."""
    try:
        found = _decoded(stored["attributes"]["saved"])
        if isinstance(found, dict) and isinstance(found.get("budget", {}), dict):
            return found
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"trainer_state.json must hold the state of ProximalTrainerCallback as it was saved, got {stored!r}")


def _encoded(value: Any) -> Any:
    """Plain data with tensors as lists, for a JSON file; decimals of a float32 or a float64 give back the same number."""
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {key: _encoded(v) for key, v in value.items()}
    return [_encoded(v) for v in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any) -> Any:
    """The plain data of ``_encoded``; keys that were integers are integers again."""
    if isinstance(value, Mapping):
        if value.keys() == {"tensor", "dtype"}:
            return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
        return {int(key) if str(key).isdigit() else key: _decoded(v) for key, v in value.items()}
    return [_decoded(v) for v in value] if isinstance(value, list) else value
