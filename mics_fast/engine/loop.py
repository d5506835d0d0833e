"""The training loop: batches, steps, log, checkpoints; independent of the method."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mics_fast.common.errors import InputError, RunFailed
from mics_fast.engine.background import CheckpointWriter
from mics_fast.engine.capture import CapturedUpdate
from mics_fast.engine.checkpoint import Checkpoints, CheckpointState, fitting
from mics_fast.engine.distributed import (
    Agreement,
    agree,
    from_first,
    least_over_ranks,
    mean_over_ranks,
    rank,
    world_size,
)
from mics_fast.engine.guard import NEVER, describe_samples, first_broken, write_batch
from mics_fast.engine.log import RunLog
from mics_fast.engine.meter import Meter, clock
from mics_fast.engine.plan import Losses, Plan, Stage
from mics_fast.engine.profile import phase, profiled
from mics_fast.engine.scores import Scores
from mics_fast.engine.update import Update, Values, computed

__all__ = ["Loop", "Losses", "Plan", "Stage"]

Batches = Callable[[int], Iterator[Any]]


class Loop:
    """Runs one stage from its last checkpoint to its end.

    Nothing is read back from the device between two records. Each rank works on its part of every
    batch; all validate together, and rank 0 alone logs and saves.

    Ranks agree on each step, whether all of them have its batch, whether to save and whether to
    stop. Several ranks ask one step ahead, so that the message travels while they train, and hold
    one more batch for it.

    Args:
        stage: models and losses.
        plan: length, optimisers, intervals.
        checkpoints: destination of checkpoints.
        meta: entries of their ``meta.json``.
        log: destination of records.
        validate: scores the current stage; name -> value. Called on all ranks. The first score of
            the first rank, higher is better, may choose the best checkpoint.
        pictures: draws the current stage after each validation, on the first rank only; title ->
            (3, H, W) uint8.
    """

    def __init__(
        self,
        stage: Stage,
        plan: Plan,
        checkpoints: Checkpoints,
        meta: Mapping[str, Any],
        log: RunLog,
        validate: Callable[[], dict[str, float]] | None = None,
        pictures: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        self.stage, self.plan, self.checkpoints = stage, plan, checkpoints
        self.meta, self.log = dict(meta), log
        self.validate, self.pictures = validate, pictures
        self.step = 0
        self.scores = Scores(plan.score, plan.patience)
        self.update = Update(stage, plan)
        self.train_on = CapturedUpdate(self.update) if plan.cuda_graph else self.update
        self.meter = self._meter(0.0)

    def load(self, state: CheckpointState) -> None:
        """Restore the state of a checkpoint.

        Raises:
            DamagedCheckpoint: the state is not one of this stage.
        """
        with fitting(f"the last checkpoint of {self.plan.name}"):
            self._load(state)

    def _load(self, state: CheckpointState) -> None:
        if self.plan.shards is not None:
            state = self.plan.shards.deal(state)
        self.step = state["step"]
        self.stage.load_state_dict(state["stage"])
        for name, optimiser in self.plan.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        scaler = state["scaler"]
        if self.plan.scaler is not None and scaler:
            self.plan.scaler.load_state_dict(scaler)
        self.update.skipped.fill_(state["skipped_steps"])
        if "scores" in state:
            self.scores.load_state_dict(state["scores"])
        torch.set_rng_state(state["rng"])
        self.meter = self._meter(state["seconds"])

    @property
    def finished(self) -> bool:
        """True if the stage has used up its steps or its patience."""
        return self.step == self.plan.steps or self.scores.out_of_patience()

    def run(self, batches: Batches) -> bool:
        """Train to the end of the plan, or of its patience.

        Args:
            batches: maps a step number to the batches from that step on, always the same ones.

        Returns:
            True at the end; False if stopped by a signal, after saving a checkpoint.

        Raises:
            RunFailed: a loss or the gradient is not finite.
            InputError: the last checkpoint cannot be written.
        """
        plan, stream, stopping = self.plan, batches(self.step), False
        if plan.flops:
            terms = [f"{name} {own / 1e9:.4g}" for name, own in plan.flops.items()]
            self.log.detail([f"{plan.name}: GFLOP per step:", *terms])
        writer = CheckpointWriter(self.checkpoints, plan.name, self.meta)
        due = Due(plan.checkpoint_every, plan.checkpoint_minutes)
        folder = self.log.folder / "profile"
        first, ahead = rank() == 0, world_size() > 1
        asked: tuple[Any, Agreement] | None = None  # the batch of a step, and what ranks say to it
        with (
            StopOnSignal() as stop,
            self.log.progress(plan.name, self.step, plan.steps),
            closing(writer),
            profiled(plan.profile if first else 0, folder, plan.name) as profiled_step,
        ):

            def ask(step: int) -> tuple[Any, Agreement]:
                batch, failure = self._take(stream)
                return batch, Agreement(stop.asked, first and due.at(step + 1), failure=failure)

            while not self.finished:
                batch, agreement = asked or ask(self.step)
                stopping, save = agreement.read()
                more = self.step + 1 < plan.steps and not stopping
                asked = ask(self.step + 1) if ahead and more else None
                self.meter.count(batch)
                values = self.train_on(batch, self.step)
                self.step += 1
                self.log.advance(self.step)
                profiled_step()
                scored = self._validation_due(save)
                logged = self.step % plan.log_every == 0
                if save or scored or stopping or logged or self.finished:
                    self._record(self._read(values, batches), writer, save, scored, stopping)
                if stopping:
                    break
        if first and self.finished:
            print(self._closing())
        return self.finished and not stopping

    def _validation_due(self, save: bool) -> bool:
        """Return True if validation is due after this step.

        A stop that was asked for adds none: a resumed run validates where one that never stopped
        does.
        """
        every = self.plan.validate_every
        due = self.step % every == 0 if every else save
        return self.validate is not None and (due or self.step == self.plan.steps)

    def _record(
        self,
        record: dict[str, float],
        writer: CheckpointWriter,
        save: bool,
        scored: bool,
        stopping: bool,
    ) -> None:
        """Score, save and log a step, as far as each is due."""
        plan = self.plan
        scores = self._score() if scored else {}
        record |= scores
        score = next(iter(scores.values()), None)
        best = score is not None and self.scores.add(self.step, score)
        last = self.finished or stopping
        if save or last or (best and plan.choose_best):
            self._save(writer, record, score if plan.choose_best else None, last)
        line = self._progress(record, score)
        self.log.write(plan.name, self.step, record, line, self._details(record))
        if scored and self.pictures is not None and rank() == 0:
            self.log.pictures(plan.name, self.step, self.pictures())
        self.meter.restart()

    def _score(self) -> dict[str, float]:
        """Validate; the same scores on all ranks."""
        assert self.validate is not None
        scores = self.validate()
        return from_first(lambda: scores)  # patience ends on all ranks at one step

    def _meter(self, before: float) -> Meter:
        flops = sum(self.plan.flops.values())
        return Meter(self.plan.device, before, flops, self.plan.peak_tflops)

    def _take(self, stream: Iterator[Any]) -> tuple[Any, InputError | None]:
        """Return the next batch, or the error that prevents it."""
        with phase("data"):
            try:
                return self.meter.take(stream), None
            except InputError as error:
                return None, error

    def _read(self, values: Values, batches: Batches) -> dict[str, float]:
        """Read the values to log: the only place where the host waits for the device.

        Non-finite values, such as the gradient norm of a step that the scaler skipped, are omitted.
        """
        ours = mean_over_ranks(computed(values))
        numbers, first = read_back(ours, self.update.guard.first_steps())
        broken = first_broken(first)
        agree(failure=self._failure(broken, batches))
        record = {"epoch": self.step / self.plan.steps_per_epoch, **numbers}
        record |= self.meter.read(self.plan.steps - self.step)
        for sentence in self.stage.warnings(record):
            self.log.warn(self.plan.name, sentence)
        return {name: value for name, value in record.items() if math.isfinite(value)}

    def _failure(self, broken: tuple[int, list[str]] | None, batches: Batches) -> RunFailed | None:
        """Describe a non-finite step, if this rank saw it first, and store its batch.

        A loss that breaks on one rank breaks the gradients of all, so only ranks that know the loss
        report it.
        """
        urgency = NEVER
        if broken is not None:
            step, names = broken
            urgency = 2 * step + (not names[0].startswith("loss_"))
        if urgency > least_over_ranks(urgency) or urgency == NEVER:
            return None
        name = self.plan.name
        batch = next(batches(step - 1))
        part = f"-rank-{rank()}" if world_size() > 1 else ""
        file = self.log.folder / "nonfinite" / f"{name}-step-{step}{part}.pt"
        where = f"in {file}"
        try:
            write_batch(file, batch, {"stage": name, "step": step, "values": names})
        except (OSError, RuntimeError) as error:  # torch.save raises either when the disk is full
            where = f"not stored: {' '.join(str(error).split())}"
        verb = "is" if len(names) == 1 else "are"
        half = "; bf16 and fp32 hold larger numbers than fp16" if self.plan.scaler else ""
        return RunFailed(
            f"{name} step {step}: {', '.join(names)} {verb} not finite, on the samples "
            f"{describe_samples(batch)} (manifest rows); the batch is {where}{half}"
        )

    def _save(
        self,
        writer: CheckpointWriter,
        record: Mapping[str, float],
        score: float | None,
        last: bool,
    ) -> None:
        """Pass a checkpoint to the writer.

        Raises:
            InputError: the final checkpoint cannot be written; after other failures, training
                goes on.
        """
        shards, scaler = self.plan.shards, self.plan.scaler
        state: CheckpointState = {
            "step": self.step,
            "stage": self.stage.state_dict(),
            "optimisers": {name: o.state_dict() for name, o in self.plan.optimisers.items()},
            "scaler": None if scaler is None else scaler.state_dict(),
            "skipped_steps": record.get("skipped_steps", 0.0),
            # The CPU's generator only: masks, shifts and augmentation are functions of (seed, step,
            # sample), so nothing draws from a GPU's generator.
            "rng": torch.get_rng_state(),
            "seconds": self.meter.seconds(),
            "scores": self.scores.state_dict(),
        }
        if shards is not None:
            state = shards.gather(state)
        if rank() == 0:
            writer.save(self.step, state, score)
        if last and (failure := from_first(writer.wait)):
            raise InputError(failure)

    def _progress(self, record: Mapping[str, float], score: float | None) -> str:
        """Format the line of a step: progress, losses, time left."""
        plan = self.plan
        epoch = -(-self.step // plan.steps_per_epoch)
        parts = [f"{plan.name}  epoch {epoch}/{plan.epochs}  step {self.step}/{plan.steps}"]
        if "loss" in record:
            parts.append(f"loss {record['loss']:.3g}")
        if score is not None:
            parts.append(self.scores.words(score))
        return "  ".join([*parts, f"{clock(record['seconds_left'])} left"])

    def _details(self, record: Mapping[str, float]) -> list[str]:
        """Format the details of a step that ``verbose`` adds."""
        parts = [
            f"{name.removeprefix('loss_')} {value:.4g}"
            for name, value in record.items()
            if name in ("lr", "gradient_norm") or name.startswith(("loss_", "val_", "knn_"))
        ]
        parts += [
            f"{record['pairs_per_second']:.0f} pairs/s",
            f"{record['ms_per_step']:.0f} ms/step",
            f"data wait {record['data_wait']:.0%}",
            f"{record['memory_gib']:.2f} GiB",
        ]
        if "tflops" in record:
            parts.append(f"{record['tflops']:.3g} TFLOP/s")
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.0%}")
        return parts

    def _closing(self) -> str:
        """Format the lines at the end of a stage."""
        early = self.step < self.plan.steps
        why = f"stopped early, {self.scores.waited} validations after the best; " if early else ""
        return f"{self.plan.name}: {why}{self.meter.summary()}"


class Due:
    """Decides when a checkpoint is due: after so many steps, or so many minutes without one.

    Args:
        steps: between checkpoints; 0 = off.
        minutes: between checkpoints; 0 = off.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self._steps, self._seconds = steps, 60 * minutes
        self._last = time.monotonic()

    def at(self, step: int) -> bool:
        """Return True if a checkpoint is due after this step."""
        now = time.monotonic()
        due = self._steps > 0 and step % self._steps == 0
        due = due or (self._seconds > 0 and now - self._last >= self._seconds)
        if due:
            self._last = now
        return due


def read_back(*groups: Mapping[str, Tensor | float]) -> list[dict[str, float]]:
    """Convert scalars of several groups to Python numbers in one transfer from the device."""
    tensors = [v.double() for group in groups for v in group.values() if isinstance(v, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return [
        {name: next(numbers) if isinstance(v, Tensor) else float(v) for name, v in group.items()}
        for group in groups
    ]


class StopOnSignal:
    """Context in which SIGTERM and the first Ctrl-C set ``asked`` instead of ending the process.

    The second Ctrl-C raises ``KeyboardInterrupt``. An ignored SIGINT stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopOnSignal:
        self._previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._ask)}
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
