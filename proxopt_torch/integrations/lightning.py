"""``ProximalCallback``: an optimizer of proxopt_torch in the ``Trainer`` of Lightning.

The callback works with ``lightning.pytorch`` and with ``pytorch_lightning``. It needs one of them:
``pip install "proxopt[trainers]"``.
"""

from __future__ import annotations

import math
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    if error.name not in ("lightning", "lightning.pytorch"):
        raise
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ModuleNotFoundError as other:
        if other.name != "pytorch_lightning":
            raise
        raise ModuleNotFoundError(
            'proxopt_torch.integrations.lightning needs Lightning: pip install "proxopt[trainers]"', name="lightning"
        ) from other

from proxopt_torch.integrations._sparse_training import SparseTraining
from proxopt_torch.penalised import Penalised

__all__ = ["ProximalCallback"]


class ProximalCallback(SparseTraining, Callback):
    """Validate and save the sparse model, follow a budget, log the zeros, and compact the model after the last epoch.

    Without it, ``HAPG``, ``AdamHAPG`` and ``ProxSGD(tau=...)`` would be validated and saved at the search point, which is not
    sparse. With it

    - validation sees the prox point, which ``optimizer.eval()`` puts into the parameters; training goes on at the search point;
    - while a fit runs, ``state_dict()`` of the module holds the prox point, and so do all checkpoints, those with
      ``save_weights_only=True`` too. Whole ones hold the search point beside it, and ``fit(ckpt_path=...)`` continues bit for
      bit, the budget included;
    - after the fit, also one that an error ended, the module is at the prox point.

    These values are logged, for a logger or ``ModelCheckpoint(monitor=...)``: ``zero_share``, the share of zero entries in the
    parameters of the optimizer, and ``living_groups``, the share of the groups of its penalties that are not zero, after each
    validation and each training epoch; and ``budget_share``, ``budget_wanted`` and ``budget_strength``, as in ``BudgetRecord``,
    with the other values of a training step.

    There must be one optimizer of proxopt_torch; others may exist beside it.

    Args:
      budget: the arguments of ``Budget`` as a dict, e.g. ``{"macs": 0.5}``; or a function of the optimizer, the network, the
        example inputs and the number of updates (None where the trainer does not know it), which returns a ``Budget`` or a
        ``StrengthPath``. Its ``step()`` is called after each update. ``steps`` is the number of updates of the fit
        unless the dict has it, and ``every`` is such that 200 measurements are made.
      network: the name of the submodule to measure and to compact, such as ``"net"``; the whole LightningModule by default.
      example_inputs: the arguments of ``network(...)``; by default ``example_input_array`` of the LightningModule.
      compact: compact the network at the end. A dict holds arguments of ``compact``, e.g. ``{"inputs": True}``.
      save_compact: a file for the state_dict of the compact network; ``load_compact`` reads it.

    Attributes:
      optimizer: that of the fit, of proxopt_torch.
      budget: what ``budget`` has made; None without it.
      report: the last ``SparsityReport``.
      compacted: the result of ``compact``, from the end of a fit on.

    Raises:
      TypeError: an argument of the wrong type, or no optimizer of proxopt_torch.
      ValueError: when the fit starts: several optimizers of proxopt_torch, or none that has a penalty; no example inputs where
        they are needed; a network that does not exist; sharded parameters that are to be compacted; a budget for a number of
        updates that the trainer does not know, or one missing although the checkpoint holds the state of one.

    >>> from proxopt_torch.integrations.lightning import ProximalCallback
    >>> callback = ProximalCallback(budget={"macs": 0.5, "start": 0.1}, network="net", compact=True)
    >>> ProximalCallback(save_compact="small.pt")
    Traceback (most recent call last):
    ...
    ValueError: save_compact must be None where compact is False, got 'small.pt'
    """

    _example_hint = "set example_input_array of the LightningModule, or pass example_inputs"

    # -- a fit --------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget a fit that an error ended; checkpoints are loaded after this."""
        self._stage = stage
        if stage == "fit":
            self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the budget; the states of the optimizer are not loaded yet."""
        example, updates = pl_module.example_input_array, trainer.estimated_stepping_batches
        again = pl_module.automatic_optimization and not self._saved  # then a trainer counts the updates of an earlier fit, too
        if again and 0 < updates < math.inf:
            updates = max(updates - trainer.global_step, 1)
        self._begin(pl_module, trainer.optimizers, example, updates, trainer.precision_plugin.convert_input)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the eval mode, in which a checkpoint is."""
        assert self.optimizer is not None
        self.optimizer.train()
        self._updates = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the budget act after an update; none was made while gradients are accumulated."""
        if trainer.global_step != self._updates:
            self._updates = trainer.global_step
            self._update()
            pl_module.log_dict(self._budget_metrics(), on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a report."""
        self._log_report(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module at the prox point, and compact it."""
        self._end(pl_module, write=trainer.is_global_zero)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a checkpoint of the end of a training, after which ``on_train_end`` is not called."""
        if self._running:
            self._end(pl_module, write=trainer.is_global_zero)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module at the prox point."""
        if self._running and self.optimizer is not None:
            self.optimizer.eval()

    # -- validations in it --------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the prox point into the module."""
        optimizer = self._fitting(trainer)
        if optimizer is not None:
            optimizer.eval()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a report."""
        if self._fitting(trainer) is not None and not trainer.sanity_checking:
            self._log_report(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the search point back."""
        optimizer = self._fitting(trainer)
        if optimizer is not None:
            optimizer.train()

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of the budget."""
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with this state in a fit. ``trainer.test(ckpt_path=...)`` loads weights only."""
        if self._stage == "fit":
            self._restore(state_dict)

    # -- parts --------------------------------------------------------------------------------

    def _fitting(self, trainer: Trainer) -> Penalised | None:
        """The optimizer in a fit. In ``trainer.validate()`` and ``test()`` the module keeps what it holds."""
        return self.optimizer if trainer.state.fn == "fit" else None

    def _log_report(self, pl_module: LightningModule) -> None:
        # the numbers are the same in all processes: sync_dist only tells Lightning so
        pl_module.log_dict(self._report_metrics(), on_step=False, on_epoch=True, sync_dist=True)
