"""The training loop: fit, train_step, evaluate. It is given objects and knows no flags, data sets or networks.

A position is (step, epoch, samples consumed in the epoch). Everything else that a resumed run needs is in
`state()`; random choices are keyed by position, so none of their state is saved.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from launch.errors import NumericError
from launch.process_group import World, from_main
from launch.stop import StopAgreement, StopRequest
from trainers.engine.checkpoints.save import Checkpointer
from trainers.engine.dropout import default_generators, seed_dropout
from trainers.engine.history import History
from trainers.engine.metrics import Evaluation, EvaluationSums, TrainingSums, sync_buffers
from trainers.engine.parallel import gradient_sync, rebuild_buckets_early, unwrap
from trainers.engine.precision import Precision
from trainers.engine.run.folder import RunFolder
from trainers.engine.run.progress import Progress, epoch_text
from trainers.engine.run.report import Report
from trainers.engine.step import gradient_norms
from trainers.engine.task import Batch, EvaluationBatches, Task, TrainBatches

REPORTS_PER_EPOCH = 10  # at fixed steps, so that a resumed run writes the same lines


class Trainer:
    """Trains one model on one rank, in step with the other ranks."""

    def __init__(
        self, model: nn.Module, optimizer: Any, task: Task, world: World, *, schedule: Callable[[int], float],
        precision: Precision, folder: RunFolder, report: Report, checkpointer: Checkpointer, stop: StopRequest,
        seed: int, accumulation_steps: int = 1, clip_grad_norm: float | None = None, ema: AveragedModel | None = None,
        frozen_norms: list[nn.Module] | None = None, channels_last: bool = False, max_bad_steps: int = 10,
        log_gradients: bool = False, config: dict[str, Any] | None = None, fingerprint: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.task, self.world = model, optimizer, task, world
        self.schedule, self.precision, self.seed = schedule, precision, seed
        self.folder, self.report, self.checkpointer, self.stop = folder, report, checkpointer, stop
        self.accumulation_steps, self.clip_grad_norm, self.ema = accumulation_steps, clip_grad_norm, ema
        self.frozen_norms = frozen_norms or []
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.max_bad_steps, self.log_gradients = max_bad_steps, log_gradients
        self.gradient_norms: dict[str, Tensor] = {}
        self.config, self.fingerprint = config or {}, fingerprint or {}
        self.dropout_generators = default_generators(model, world.device)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.step = self.epoch = self.samples_consumed = 0
        self.history = History()
        self.last_evaluation: Evaluation | None = None
        self.sums = TrainingSums(classification=task.num_classes is not None)

    def fit(self, train: TrainBatches, test: EvaluationBatches | None, *, epochs: int, max_steps: int | None = None,
            eval_every: int = 1, checkpoint_every: int | None = None) -> Literal["done", "stopped"]:
        """Train from the present position to the end, or until a stop that all ranks agree on.

        Raises:
            NumericError: after `max_bad_steps` consecutive steps with a non-finite loss.
            CheckpointError: if a checkpoint cannot be written.
        """
        last_step = min(epochs * train.steps_per_epoch, max_steps or epochs * train.steps_per_epoch)
        agreement = StopAgreement(self.world.world_size)
        progress = Progress(shown=self.world.is_main, total_steps=last_step, step=self.step)
        try:
            while self.step < last_step or not self.history.has_recorded(self.step):
                self.last_evaluation = None
                if not self.train_epoch(train, last_step, agreement, progress, checkpoint_every):
                    return self._stop_here()
                last_epoch = self.step >= last_step
                if (last_epoch or (self.epoch + 1) % eval_every == 0) and test is not None:
                    self.last_evaluation = self.evaluate(test)
                    if self.last_evaluation is None:
                        return self._stop_here()
                is_best = self._finish_epoch(train, progress)
                if is_best or last_epoch or checkpoint_every is None or self.step % checkpoint_every == 0:
                    self._save(is_best=is_best)
            from_main(self.world, self.checkpointer.join)
            return "done"
        finally:
            self.checkpointer.wait()  # before the run folder is given up
            progress.close()

    def train_epoch(self, train: TrainBatches, last_step: int, agreement: StopAgreement, progress: Progress,
                    checkpoint_every: int | None) -> bool:
        """The rest of the epoch; False if all ranks agreed to stop within it."""
        if self.stop and self.world.world_size == 1:
            return False
        self._train_mode()
        interval = max(1, train.steps_per_epoch // REPORTS_PER_EPOCH)
        batches = train.batches(self.epoch, self.samples_consumed)
        if self.history.samples_here == 0:
            batches = rebuild_buckets_early(self.model, self.world, batches, loss=self._loss)
        self.history.start_clock()
        while self.samples_consumed < train.steps_per_epoch * train.global_batch_size and self.step < last_step:
            step_in_epoch = self.samples_consumed // train.global_batch_size + 1
            ends = step_in_epoch == train.steps_per_epoch or self.step + 1 == last_step
            report_due = ends or step_in_epoch % interval == 0
            self.train_step(batches, watch_gradients=self.log_gradients and report_due)
            if self.history.samples_here == 0 and self.world.is_main:
                self.checkpointer.prepare(self.state([]))  # the optimizer has its state now
            self.samples_consumed += train.global_batch_size
            self.history.samples_here += train.global_batch_size
            if report_due:
                self._report(progress, last_step)
            progress.advance()
            if (agreement.due() or self.step == last_step) and self._agreed_to_stop(agreement, last_step):
                self.history.pause_clock(self.world.device)
                return False
            if checkpoint_every is not None and self.step % checkpoint_every == 0 and not ends:
                self.history.pause_clock(self.world.device)
                self._save()
                self.history.start_clock()
        self.history.pause_clock(self.world.device)
        return True

    def train_step(self, batches: Iterator[Batch], *, watch_gradients: bool = False) -> None:
        """One optimizer update from the next `accumulation_steps` micro-batches. Nothing in it waits for the device."""
        mark, step = self.world.watchdog.mark, self.step
        seed_dropout(self.dropout_generators, seed=self.seed, step=step, rank=self.world.rank)
        self._set_learning_rate()
        for micro_step in range(self.accumulation_steps):
            mark("data", step)
            inputs, targets = self._to_device(*next(batches))
            with gradient_sync(self.model, last=micro_step == self.accumulation_steps - 1):
                mark("forward", step)
                outputs, loss = self._forward(inputs, targets)
                mark("backward", step)
                self.precision.backward(loss / self.accumulation_steps if self.accumulation_steps > 1 else loss)
            self.sums.update(loss, outputs, targets)
        mark("optimizer", step)
        if watch_gradients or self.clip_grad_norm is not None:
            self.precision.unscale(self.optimizer)
        if watch_gradients:
            self.gradient_norms = gradient_norms(unwrap(self.model))  # already averaged over the ranks
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip_grad_norm)
        self.checkpointer.finish_copy()
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(unwrap(self.model))
        self.step += 1

    def _to_device(self, inputs: Tensor, targets: Tensor) -> Batch:
        inputs = inputs.to(self.world.device, memory_format=self.memory_format, non_blocking=True)
        return inputs, targets.to(self.world.device, non_blocking=True)

    def _forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs and the loss."""
        with self.precision.autocast():
            outputs = self.model(inputs)
            return outputs, self.task.loss(outputs, targets)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._forward(*self._to_device(inputs, targets))[1]

    @torch.no_grad()
    def evaluate(self, test: EvaluationBatches) -> Evaluation | None:
        """Count every sample of the test set once, over all ranks; None on every rank if any was asked to stop.

        Through the unwrapped model, or its moving average, with rank 0's buffers. No collective inside the loop, so
        ranks may have different numbers of batches.
        """
        model = self.evaluated_model()
        sync_buffers(model, self.world)
        model.eval()
        sums = EvaluationSums(self.world.device, num_classes=self.task.num_classes)
        for inputs, targets in test:
            self.world.watchdog.mark("evaluate", self.step)
            if self.stop:
                break
            inputs, targets = self._to_device(inputs, targets)
            with self.precision.autocast():
                outputs = model(inputs)
            sums.update(self.task.test_loss(outputs.float(), targets), outputs, targets)
        return sums.reduce(self.world, interrupted=bool(self.stop))

    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average of the weights, if one is kept."""
        return self.ema.module if self.ema is not None else unwrap(self.model)

    def _train_mode(self) -> None:
        self.model.train()
        for module in self.frozen_norms:
            module.eval()  # frozen BatchNorm neither normalises by the batch nor follows it

    def _set_learning_rate(self) -> None:
        multiplier = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    def _agreed_to_stop(self, agreement: StopAgreement, last_step: int) -> bool:
        """Vote with the other ranks.

        Raises:
            NumericError: if a rank has counted too many bad steps, or the last step is bad: all ranks raise it.
        """
        self.world.watchdog.mark("reduce", self.step)
        self.sums.collect()  # a wait for the device, twice a second
        stop, bad_steps = agreement.vote(self.stop, self.sums.bad_steps)
        if bad_steps >= (1 if self.step == last_step else self.max_bad_steps):
            raise NumericError(f"step {self.step}: the loss is not finite for {bad_steps} consecutive steps; lower "
                               f"--learning-rate or set --clip-grad-norm; the last good checkpoint is kept")
        return stop

    def _report(self, progress: Progress, last_step: int) -> None:
        """One line of metrics.jsonl, of the epoch so far: a collective, and the one place that waits for the device."""
        self.history.pause_clock(self.world.device)
        loss, accuracy = self.sums.means(self.world)
        speed = self.history.lap_samples_per_second()
        self._write_line("train", loss, accuracy, speed)
        progress.report(loss=loss, accuracy=accuracy, samples_per_second=speed,
                        seconds_left=(last_step - self.step) * self.history.train_seconds / max(self.step, 1))

    def _write_line(self, split: str, loss: float, accuracy: float | None, speed: float | None) -> None:
        line: dict[str, Any] = {
            "split": split, "step": self.step, "epoch": self.epoch, "loss": loss, "accuracy": accuracy,
            "learning_rate": self.optimizer.param_groups[0]["lr"], "samples_per_second": speed,
            "seconds": self.history.train_seconds,
        }
        if split == "train" and self.gradient_norms:
            line["gradient_norms"] = {name: norm.item() for name, norm in self.gradient_norms.items()}
        self.report.line(line)

    def _finish_epoch(self, train: TrainBatches, progress: Progress) -> bool:
        """Record the evaluation, if there was one, and move to the next epoch if this one is complete.

        Returns:
            Whether the evaluation is the best so far.
        """
        evaluation = self.last_evaluation
        loss, accuracy = self.sums.means(self.world)
        if evaluation is not None:
            self._write_line("test", evaluation.loss, evaluation.accuracy, None)
        is_best = self.history.record(epoch=self.epoch, step=self.step, train_loss=loss, train_accuracy=accuracy,
                                      evaluation=evaluation)
        speed = self.step * train.global_batch_size / self.history.train_seconds
        progress.note(epoch_text(self.history.epochs[-1], samples_per_second=speed))
        self.report.curves(self.history.epochs, steps_per_epoch=train.steps_per_epoch)
        if self.samples_consumed >= train.steps_per_epoch * train.global_batch_size:
            self.epoch, self.samples_consumed = self.epoch + 1, 0
            self.sums.reset()
        self.folder.write_status("RUNNING", step=self.step, epoch=self.epoch)
        return is_best

    def _stop_here(self) -> Literal["stopped"]:
        self._save()
        from_main(self.world, self.checkpointer.join)  # a launcher gives the others little time once one rank has ended
        return "stopped"

    def _save(self, *, is_best: bool = False) -> None:
        """Hand the state to the checkpointer, on rank 0; collecting it is collective. Once a step.

        Not while the loss is not finite: that would push the last good checkpoint out.
        """
        if self.step == self.checkpointer.last_step and not is_best:
            return
        self.world.watchdog.mark("checkpoint", self.step)
        running = self.sums.of_all_ranks(self.world)
        if any(bad_steps for _, _, _, bad_steps in running):
            return
        self.checkpointer.last_step = self.step
        if self.world.is_main:
            self.checkpointer.save(self.state(running), is_best=is_best)

    def state(self, running: list[list[float]]) -> dict[str, Any]:
        """Everything a checkpoint holds; tensors are the live ones."""
        return {
            "model": unwrap(self.model).state_dict(keep_vars=True), "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "step": self.step, "epoch": self.epoch, "samples_consumed": self.samples_consumed,
            "best": self.history.best, "history": {**self.history.state(), "running": running},
            "config": self.config, "fingerprint": self.fingerprint, "format": 1,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state, which was checked to fit."""
        unwrap(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.n_averaged.fill_(min(1, state["step"]))  # 0 would start the average anew
        self.step, self.epoch, self.samples_consumed = state["step"], state["epoch"], state["samples_consumed"]
        self.history.load_state(state["history"], best=state["best"])
        self.sums.restore(state["history"]["running"], self.world)
        self.checkpointer.last_step = self.step
