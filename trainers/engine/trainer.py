"""The training loop: epochs, votes, reports, saves. It is given objects and knows no flags, data sets or networks.
A position is (step, epoch, samples consumed in it), by which random choices are keyed: none of their state is saved."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launch.errors import NumericError, to_stderr
from launch.process_group import World, from_main, gather
from launch.stop import StopAgreement, Stopped, StopRequest
from trainers.engine import history, metrics, parallel
from trainers.engine.checkpoints.save import LOWER_RATE, Checkpointer
from trainers.engine.run.folder import RunFolder
from trainers.engine.run.report import Progress, Report, epoch_text
from trainers.engine.step import TrainStep, tried_first
from trainers.engine.task import EvaluationBatches, TrainBatches

REPORTS_PER_EPOCH = 10  # at fixed steps, so that a resumed run writes the same lines


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, on this rank: what trains, with which ranks, into which folder, and whether it was asked to stop."""
    trainer: str  # its file name without .py
    world: World
    folder: RunFolder
    stop: StopRequest
    config: Any  # the flags, with the preprocessing of the checkpoint where one is evaluated
    evaluated: Mapping[str, Any] | None  # the state of that checkpoint
    known: tuple[str, ...] | None  # the classes that its outputs stand for
    user_code: dict[str, str]  # the sha256 of each of the user's files, by path


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """When the loop does something besides training, and when it gives up."""
    eval_every: int  # epochs; the last one is always evaluated
    checkpoint_every: int | None  # steps; None: after every epoch
    max_bad_steps: int  # in a row, with a loss that is not finite
    log_gradients: bool
    split: Literal["test", "validation"]  # what the evaluations during training are of, for metrics.jsonl
    best: metrics.BestName  # the figure by which one is the best
    patience: int | None  # evaluations without a better one after which training ends


class Trainer:
    """Trains one model on one rank, in step with the other ranks."""

    def __init__(self, train_step: TrainStep, run: Run, *, checkpointer: Checkpointer, report: Report,
                 options: LoopOptions, config: dict[str, Any], fingerprint: dict[str, Any], data: history.DataRecord
                 ) -> None:
        self.train_step, self.sums = train_step, train_step.sums
        self.world, self.folder, self.stop = run.world, run.folder, run.stop
        self.checkpointer, self.report, self.options = checkpointer, report, options
        self.config, self.fingerprint, self.data = config, fingerprint, data
        self.step = self.epoch = self.samples_consumed = 0
        self.saved_step: int | None = None  # the last one whose state was handed to the checkpointer, or loaded
        self.history = history.History()
        self.last_evaluation: metrics.Evaluation | None = None
        self._agreement = StopAgreement(run.world.world_size)

    def fit(self, train: TrainBatches, test: EvaluationBatches, *, last_step: int) -> None:
        """Train from here to the end; Stopped on every rank, once the state is saved; NumericError, CheckpointError."""
        progress = Progress(shown=self.world.is_main, total_steps=last_step, step=self.step)
        try:
            while (self.step < last_step and not self.out_of_patience) or not self.history.has_recorded(self.step):
                self.fit_epoch(train, test, last_step, progress)
            from_main(self.world, self.checkpointer.join)
        except Stopped:
            self._save()
            from_main(self.world, self.checkpointer.join)  # a launcher gives others little time once a rank has ended
            raise
        finally:
            self.checkpointer.wait()  # before the run folder is given up
            progress.close()

    def fit_epoch(self, train: TrainBatches, test: EvaluationBatches, last_step: int, progress: Progress) -> None:
        """The rest of the epoch, its evaluation if one is due, its record, and a checkpoint if one is due."""
        past, options, evaluation = self.history, self.options, None
        self.train_epoch(train, last_step, progress, checkpoint_every=options.checkpoint_every)
        if self.step >= last_step or (self.epoch + 1) % options.eval_every == 0:
            evaluation = self.evaluate(test)
            self.write_line(options.split, evaluation.summary(), evaluation.metrics)
        self.last_evaluation = evaluation
        loss, accuracy = self.sums.means(self.world)
        is_best = past.record(epoch=self.epoch, step=self.step, train_loss=loss, train_accuracy=accuracy,
                              evaluation=evaluation, split=options.split, by=options.best)
        waited = max(gather(self.world, past.data_wait_seconds))
        if (warning := past.record_wait(waited, getattr(train, "remedy", ""))) and self.world.is_main:
            to_stderr(warning)
        speed = self.step * train.global_batch_size / past.train_seconds
        progress.line_above(epoch_text(past.epochs[-1], samples_per_second=speed))
        is_last = self.step >= last_step or self.out_of_patience
        self.finish_epoch(train)
        if is_best or is_last or options.checkpoint_every is None or self.step % options.checkpoint_every == 0:
            self._save(is_best=is_best)
        self.folder.write_status("RUNNING", step=self.step, epoch=self.epoch)
        if not is_last:  # the last picture is drawn once the run is DONE
            self.report.curves(past.epochs, steps_per_epoch=train.steps_per_epoch)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations were no better than one before; the same on every rank."""
        patience = self.options.patience
        return patience is not None and self.history.evaluations_since_best(self.options.split) >= patience

    def train_epoch(self, train: TrainBatches, last_step: int, progress: Progress, *,
                    checkpoint_every: int | None = None) -> None:
        """The rest of the epoch, or up to `last_step`; raises Stopped on every rank at the same step."""
        step = self.train_step
        if self.stop and self.world.world_size == 1:
            raise Stopped(self.stop.reason)
        step.train_mode()
        interval = max(1, train.steps_per_epoch // REPORTS_PER_EPOCH)
        batches = train.batches(self.epoch, self.samples_consumed)
        self.history.start_clock()
        if not self.history.samples_here:
            batches = tried_first(step, batches, self.config)
            batches = parallel.warmed_up(step.model, self.world, batches,
                                         loss=lambda *batch: step.forward(*step.to_device(*batch))[1])
            self.history.end_warm_up(self.world.device)
        while self.samples_consumed < train.steps_per_epoch * train.global_batch_size and self.step < last_step:
            step_in_epoch = self.samples_consumed // train.global_batch_size + 1
            ends = step_in_epoch == train.steps_per_epoch or self.step + 1 == last_step
            report_due = ends or step_in_epoch % interval == 0
            self.train_step(batches, step=self.step, before_update=self.checkpointer.finish_copy,
                            watch_gradients=self.options.log_gradients and report_due)
            if self.history.samples_here == 0 and self.world.is_main:
                self.checkpointer.prepare(self.state([]))  # the optimizer has its state now
            self.step += 1
            self.samples_consumed += train.global_batch_size
            self.history.samples_here += train.global_batch_size
            if report_due:
                self._report(progress, last_step)
            progress.advance()
            if self._agreement.due() or self.step == last_step:
                self._vote(last_step)
            if checkpoint_every is not None and self.step % checkpoint_every == 0 and not ends:
                self.history.pause_clock(self.world.device)
                self._save()
                self.history.start_clock()
        self.history.pause_clock(self.world.device)

    def finish_epoch(self, train: TrainBatches) -> None:
        """Move to the next epoch if this one is complete, and was not cut short by the last step."""
        if self.samples_consumed >= train.steps_per_epoch * train.global_batch_size:
            self.epoch, self.samples_consumed = self.epoch + 1, 0
            self.sums.reset()

    def evaluate(self, test: EvaluationBatches) -> metrics.Evaluation:
        """As TrainStep.evaluate; where nothing was trained the network is tried first."""
        if self.config.get("evaluate") is not None:
            test = tried_first(self.train_step, iter(test), self.config)
        return self.train_step.evaluate(test, self.stop)

    def _vote(self, last_step: int) -> None:
        """Agree with the other ranks on whether to continue; all raise Stopped, or NumericError for bad steps."""
        self.world.watchdog.mark("reduce")
        self.sums.collect()  # a wait for the device, twice a second
        self.history.pause_clock(self.world.device)  # for good, if all are to stop
        bad_steps = self._agreement.vote(self.stop, self.sums.bad_steps)
        if bad_steps >= (1 if self.step == last_step else self.options.max_bad_steps):
            raise NumericError(f"step {self.step}: the loss is not finite for {bad_steps} consecutive steps; "
                               f"{LOWER_RATE}")

    def _report(self, progress: Progress, last_step: int) -> None:
        """One line of metrics.jsonl, of the epoch so far: a collective, and the one place that waits for the device."""
        self.history.pause_clock(self.world.device)
        self.history.data_wait_seconds += self.train_step.data_wait.collect()
        loss, accuracy = self.sums.means(self.world)
        speed = self.history.lap_samples_per_second()
        self.write_line("train", {"loss": loss, "accuracy": accuracy}, {}, speed)
        seconds_left = (last_step - self.step) * self.history.train_seconds / max(self.step, 1)
        progress.show_figures(loss=loss, accuracy=accuracy, samples_per_second=speed, seconds_left=seconds_left)
        self.history.start_clock()

    def write_line(self, split: str, figures: Mapping[str, float | None], others: Mapping[str, float],
                   speed: float | None = None) -> None:
        """One line of metrics.jsonl: loss, accuracy, perhaps accuracy_top5, and others at the present position."""
        rate = self.train_step.optimizer.param_groups[0]["lr"]
        line = {"split": split, "step": self.step, "epoch": self.epoch, **figures, "learning_rate": rate,
                "samples_per_second": speed, "seconds": self.history.train_seconds}
        if split == "train" and self.train_step.gradient_norms:
            line["gradient_norms"] = {name: norm.item() for name, norm in self.train_step.gradient_norms.items()}
        self.report.line(metrics.with_metrics(line, others))

    def _save(self, *, is_best: bool = False) -> None:
        """Hand the state to the checkpointer, once per step, while its loss is finite. A collective."""
        if (self.step == self.saved_step and not is_best) or self.train_step.is_under_way:
            return
        self.world.watchdog.mark("checkpoint")
        running = self.sums.of_all_ranks(self.world)
        if not any(bad_steps for _, _, _, bad_steps in running):  # else it would push the last good checkpoint out
            self.data.settle()
            self.saved_step = self.step
            if self.world.is_main:
                self.checkpointer.save(self.state(running), is_best=is_best)

    def state(self, running: list[list[float]]) -> dict[str, Any]:
        """Everything a checkpoint holds; tensors are the live ones."""
        return {**self.train_step.state(), "step": self.step, "epoch": self.epoch,
                "samples_consumed": self.samples_consumed, "best": self.history.best,
                "history": {**self.history.state(), "running": running}, "config": self.config, "format": 1,
                "fingerprint": {**self.fingerprint, "dataset": self.data.fingerprint}, **self.data.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state, which was checked to fit."""
        self.train_step.load_state(state)
        self.step, self.epoch, self.samples_consumed = state["step"], state["epoch"], state["samples_consumed"]
        self.history.load_state(state["history"], best=state["best"])
        self.sums.restore(state["history"]["running"], self.world)
        self.saved_step = self.step
        self.world.watchdog.mark("resume", self.step)
