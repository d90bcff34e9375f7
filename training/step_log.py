"""What a run's logs say of its training, and when: the row of n tells of n optimizer steps."""

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from training.csv_log import record


class StepRows(L.Callback):
    """Records its figures at every trainer.log_every_n_steps and ahead of validations, so that no
    row lacks them."""

    def __init__(self):
        self._written = 0  # the step

    def figures(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        """Those of the steps since they were last asked for."""
        raise NotImplementedError

    def on_train_start(self, trainer, pl_module) -> None:
        self._written = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == self._written:
            return  # between two micro-batches, or a run that goes on with a validation
        self._written = trainer.global_step
        if trainer.is_global_zero and trainer.loggers:
            record(trainer, self.figures(trainer, module))


class TrainingFigures(StepRows):
    """Of the last step: its loss, which is the mean over the tokens that count in the global batch,
    and with `rates` its learning rate; and how many steps were left out so far."""

    def __init__(self, rates: bool):
        super().__init__()
        self.rates = rates
        self._rate = 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._rate = optimizer.param_groups[0]["lr"]

    def figures(self, trainer, module) -> dict[str, float]:
        rate = {"trainer/lr": self._rate} if self.rates else {}
        health = module.health
        return {"trainer/loss": health.loss, **rate, "trainer/bad_steps": health.bad_steps}
