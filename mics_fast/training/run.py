"""A run folder: options, digest of the manifest, checkpoints, log, result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NotRequired, TypedDict

from mics_fast.common.errors import InputError
from mics_fast.common.files import make_folder, read_json, write_json, write_text
from mics_fast.common.locks import lock_folder
from mics_fast.data.manifest import Manifest, digest_difference
from mics_fast.engine.checkpoint import Checkpoints
from mics_fast.engine.log import read_log
from mics_fast.models.sizes import canonical
from mics_fast.models.weights import HUB
from mics_fast.options import TrainConfig
from mics_fast.options.commands import CONFIG, read_config
from mics_fast.options.parsing import as_yaml

MANIFEST = "manifest.json"  # in a run folder: Manifest.digest()

# Options that may change on resume: none of them changes the losses.
FREE_ON_RESUME = {
    "stage", "device", "log_every", "validate_every", "checkpoint_every", "checkpoint_minutes",
    "keep_checkpoints", "peak_tflops", "profile", "cuda_graph", "model.activation_checkpointing",
    "log.wandb", "log.mlflow", "threads", "data.threads", "data.prefetch", "data.on_bad_file",
    "shard_parameters", "shard_across", "timeout_minutes", "finetune.feature_cache",
}  # fmt: skip


# Options that may differ between the processes of a run: paths, and shares of their machine.
OF_ONE_PROCESS = {
    "out", "data.manifest", "model.init", "finetune.init", "finetune.feature_cache", "threads",
    "data.threads",
}  # fmt: skip


class StageResult(TypedDict):
    """Outcome of a stage, read from its log.

    Args:
        steps: optimiser steps so far.
        loss: last loss; None if it was not finite.
        losses: last value of each loss term.
        pairs_per_second: median over the log; None if it was not logged.
        seconds: wall time; None if it was not logged.
        best_step: step of the best checkpoint, if one was chosen.
        val: scores of that checkpoint on the val rows.
    """

    steps: float
    loss: float | None
    losses: dict[str, float]
    pairs_per_second: float | None
    seconds: float | None
    best_step: NotRequired[int]
    val: NotRequired[dict[str, float]]


class RunResult(TypedDict):
    """Outcome of a run: its folder, and the outcome of each stage by name."""

    run: str
    stages: dict[str, StageResult]


class Run:
    """The folder of one run.

    Args:
        folder: holds config.yaml, manifest.json, metrics.jsonl, tensorboard/, checkpoints/.
        config: the run's options.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder, self.config = folder, config

    @staticmethod
    def start(config: TrainConfig, manifest: Manifest, *, resume: bool) -> Run:
        """Make the folder of a new run, or open an existing one to resume; lock it.

        Raises:
            InputError: a run exists and ``resume`` is False; it was started with other options or
                another manifest; another process trains there; the folder cannot be written.
        """
        folder, config = Path(config.out), with_absolute_paths(config)
        file = folder / CONFIG
        if file.exists() and not resume:
            raise InputError(
                f"{folder} holds a run; add --resume to continue, or name another --out"
            )
        if file.exists():
            refuse_changes(read_config(file), config, folder)
            refuse_other_manifest(folder, manifest)
        make_folder(folder)
        lock_folder(folder)
        write_text(file, as_yaml(asdict(config)))
        write_json(folder / MANIFEST, manifest.digest())
        return Run(folder, config)

    @staticmethod
    def open(folder: Path) -> Run:
        """Open a run for reading.

        Raises:
            InputError: the folder holds no run.
        """
        file = folder / CONFIG
        if not file.exists():
            raise InputError(f"{folder} holds no run: {CONFIG} is missing")
        return Run(folder, read_config(file))

    def digest(self) -> dict[str, str] | None:
        """Return ``Manifest.digest`` from the start of the run; None if unknown.

        Raises:
            InputError: the file is damaged.
        """
        return read_digest(self.folder)

    def checkpoints(self, stage: str) -> Checkpoints:
        """Return the checkpoints of a stage, "pretrain" or "finetune"."""
        return Checkpoints(self.folder / "checkpoints" / stage, self.config.keep_checkpoints)

    def result(self) -> RunResult:
        """Read the outcome of each stage from the log."""
        log = read_log(self.folder)
        stages = {name: self._stage_result(name, lines) for name, lines in log.items()}
        return {"run": str(self.folder), "stages": stages}

    def _stage_result(self, stage: str, lines: Sequence[dict[str, float]]) -> StageResult:
        last = lines[-1]
        speeds = [line["pairs_per_second"] for line in lines if "pairs_per_second" in line]
        result: StageResult = {
            "steps": last["step"],
            "loss": last.get("loss"),
            "losses": _named("loss_", last),
            "pairs_per_second": median(speeds) if speeds else None,
            "seconds": last.get("seconds"),
        }
        best = self.checkpoints(stage).best_step()
        if best is not None:
            scored = next((line for line in lines if line["step"] == best), {})
            result["best_step"] = best
            result["val"] = _named("val_", scored)
        return result


def _named(prefix: str, record: Mapping[str, float]) -> dict[str, float]:
    """Return the entries of a log record with a prefix, which is removed from their names."""
    return {n.removeprefix(prefix): v for n, v in record.items() if n.startswith(prefix)}


def read_digest(folder: Path) -> dict[str, str] | None:
    """Read the digest of the manifest from a run folder; None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    digest = read_json(file)
    named = isinstance(digest, dict) and "rows" in digest
    if not named or not all(isinstance(own, str) for own in digest.values()):
        raise InputError(f"{file} is damaged, wanted the digest of a manifest")
    return digest


def refuse_other_manifest(folder: Path, manifest: Manifest) -> None:
    """Refuse to resume a run with other rows, labels, groups or splits.

    Raises:
        InputError: names the difference.
    """
    before = read_digest(folder)
    if before is None:
        return
    difference = digest_difference(before, manifest.digest())
    if difference:
        raise InputError(
            f"{manifest.path} is not the manifest that the run in {folder} was started with: "
            f"{difference}; use that one, or name another --out"
        )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Make the paths of a run absolute, so that it can be resumed from any folder."""

    def absolute(path: str) -> str:
        named = path in ("", "none") or path.startswith(HUB)
        return path if named else os.path.abspath(path)

    return with_paths(config, absolute)


def with_paths(config: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """Change every path that a run reads from."""
    return replace(
        config,
        data=replace(config.data, manifest=change(config.data.manifest)),
        model=replace(config.model, init=change(config.model.init)),
        finetune=replace(
            config.finetune,
            init=change(config.finetune.init),
            feature_cache=change(config.finetune.feature_cache),
        ),
    )


def pretraining_of(run: Run) -> Path | None:
    """Find the pre-training that a run's fine-tuning starts from; None: from scratch.

    Raises:
        InputError: ``finetune.init`` names no pre-training.
    """
    init = run.config.finetune.init
    if init == "none":
        return None
    return find_pretraining(Path(init)) if init else run.checkpoints("pretrain").latest()


def find_pretraining(path: Path) -> Path:
    """Find the checkpoint folder for a run folder, a checkpoint folder or its state.pt.

    Raises:
        InputError: there is no checkpoint.
    """
    if path.name == "state.pt":
        path = path.parent
    if (path / "meta.json").exists():
        return path
    latest = Checkpoints(path / "checkpoints" / "pretrain").latest()
    if latest is None:
        raise InputError(f"finetune.init {path} holds no pre-training checkpoint")
    return latest


def identity(
    config: TrainConfig, modalities: Sequence[str], classes: Sequence[str], stage: str
) -> dict[str, Any]:
    """Return the ``meta.json`` entries that identify a model; weights fit only if all agree."""
    model = asdict(canonical(config.model))
    for name in ("init", "init_prefix"):  # the origin of the weights does not change their shape
        model.pop(name)
    model.pop("activation_checkpointing")  # changes memory, not weights
    for name in ("image", "geometry"):
        if not model[name]:  # as in runs from before there was a choice
            model.pop(name)
    if "geometry" in model:
        model.pop("size")
    if stage == "pretrain":
        model.pop("fusion_depth")
        model.pop("pooled_fusion")
        return {"stage": stage, "model": model, "modalities": list(modalities)}
    model.pop("projection")
    options = config.finetune
    if options.encoder == "frozen":
        model.pop("fusion_depth")
        model["encoder"] = "frozen"
    else:
        model.pop("pooled_fusion")
    if options.encoder == "lora":
        model["encoder"] = f"lora of rank {options.lora_rank}, alpha {options.lora_alpha:g}"
    return {
        "stage": stage,
        "model": model,
        "modalities": list(modalities),
        "classes": list(classes),
    }


def refuse_changes(before: TrainConfig, now: TrainConfig, folder: Path) -> None:
    """Refuse to resume a run with options that would change its results.

    Raises:
        InputError: names the first such option and its two values, and counts the others.
    """
    old, new = flatten(asdict(before)), flatten(asdict(with_absolute_paths(now)))
    free = FREE_ON_RESUME | {"out"}
    changed = [
        name for name in {**new, **old} if name not in free and old.get(name) != new.get(name)
    ]
    if changed:
        name = changed[0]
        others = f" (and {len(changed) - 1} more differ)" if len(changed) > 1 else ""
        raise InputError(
            f"option {name} is {new.get(name)!r}, but the run in {folder} was started with "
            f"{old.get(name)!r}{others}; use that, or name another --out"
        )


def shared_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that must be equal on all processes of a run, with names for messages."""
    own = flatten(asdict(config))
    return {f"option {name}": own[name] for name in own if name not in OF_ONE_PROCESS}


def manifest_entries(manifest: Manifest) -> dict[str, str]:
    """Return the digest of a manifest, with names for messages."""
    return {f"manifest {name}": own[:12] for name, own in manifest.digest().items()}


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
