"""The trainer: builds each stage from options and manifest, and runs it into a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from mics_fast.common.errors import InputError, RunFailed, warn
from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import decoder_of
from mics_fast.data.features import FeatureLoader, FeatureRows, Features
from mics_fast.data.loaders import PairBatch, TrainLoader
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.data.manifest_checks import check_manifest
from mics_fast.engine.checkpoint import fitting, load_checkpoint, weights_of
from mics_fast.engine.distributed import (
    from_first,
    processes_here,
    rank,
    refuse_differences,
    start_alike,
    world_size,
)
from mics_fast.engine.guard import is_out_of_memory
from mics_fast.engine.log import RunLog, read_log
from mics_fast.engine.loop import Loop, Plan
from mics_fast.engine.precision import bf16_speedup, pick_precision
from mics_fast.engine.sharding import Shards, shard_mesh
from mics_fast.engine.threads import use_threads
from mics_fast.engine.trackers import TRACKERS, tracker_module
from mics_fast.evaluation.metrics import confusion
from mics_fast.evaluation.opinions import Predictions, collect_opinions
from mics_fast.models.classifier import Classifier, check_modality_names, load_encoders
from mics_fast.models.pooled import PooledEncoder
from mics_fast.models.sizes import SIZES, network_name, size_of
from mics_fast.models.vit import VisionTransformer, checkpoint_activations
from mics_fast.options import (
    FinetuneConfig,
    PretrainConfig,
    TrainConfig,
    contrasted_pairs,
    wants_unlabelled,
)
from mics_fast.options.checks import (
    check_batches,
    check_cuda_graph,
    check_dtype,
    check_modality_options,
    check_pretraining,
    check_sharding,
    check_shares,
)
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.health import closing_warnings
from mics_fast.stages.pretrain import PretrainStage
from mics_fast.training.build import (
    adapt,
    as_from_scratch,
    build_classifier,
    build_finetuning,
    build_pretraining,
    class_weights,
    pick_device,
)
from mics_fast.training.features import BATCH, FeatureMaker
from mics_fast.training.output import say
from mics_fast.training.pictures import (
    confusion_picture,
    prediction_strip,
    reconstruction_strip,
)
from mics_fast.training.run import (
    Run,
    flatten,
    identity,
    manifest_entries,
    pretraining_of,
    shared_options,
)
from mics_fast.training.start import (
    ENCODER,
    load_start,
    read_encoder,
    with_encoder,
    write_encoder,
)
from mics_fast.training.validation import ValRows

Batches = Iterator[tuple[PairBatch, ...]]


def train(config: TrainConfig, *, resume: bool, verbose: bool = False) -> Training:
    """Run the stages of a configuration; called on every rank."""
    manifest = read_manifest(
        Path(config.data.manifest),
        config.data.modalities,
        files_exist=config.data.on_bad_file == "error",
    )
    for warning in check_manifest(manifest):
        if rank() == 0:
            warn(f"warning: {warning}")
    trainer = Trainer(config, manifest, resume=resume, verbose=verbose)
    stages = ("pretrain", "finetune") if config.stage == "both" else (config.stage,)
    finished = True
    for stage in stages:
        finished = trainer.pretrain() if stage == "pretrain" else trainer.finetune()
        if not finished:
            break
    return Training(trainer.run, finished)


class Training(NamedTuple):
    """Outcome of training.

    Args:
        run: Its folder.
        finished: False if stopped before its end.
    """

    run: Run
    finished: bool


class Trainer:
    """Builds each stage from the configuration and the manifest, and runs it.

    Args:
        config: the run's options.
        manifest: training data.
        resume: continue the run in ``config.out`` if there is one.
        verbose: print every loss and rate.

    Raises:
        InputError: no train rows, no DALI, no such device, or an unusable run folder.
    """

    def __init__(
        self, config: TrainConfig, manifest: Manifest, *, resume: bool, verbose: bool = False
    ) -> None:
        for name in TRACKERS:
            if getattr(config.log, name):
                tracker_module(name)
        here = {"processes per machine": processes_here()}
        own = here if config.shard_across == "machine" else {}
        refuse_differences(shared_options(config) | manifest_entries(manifest) | own)
        given = config
        config = from_first(lambda: with_encoder(given, manifest.modalities))
        self.config, self.manifest, self.verbose = config, manifest, verbose
        self.rows = manifest.select("train")
        if not self.rows:
            raise InputError(f"{manifest.path} has no row with split train")
        check_modality_names(manifest.modalities)
        check_modality_options(config, manifest.modalities)
        check_shares(config, world_size())
        check_batches(config, len(self.rows))
        if config.stage != "pretrain":
            check_labels(manifest)
            class_weights(config.finetune, manifest)
            check_patience(config.finetune, manifest)
        self.device = pick_device(config.device)
        if decoder_of(config.data, self.device) == "cpu" and config.data.decoder == "auto":
            say("Pillow decodes the images: NVIDIA DALI, which is faster, is not installed")
        check_cuda_graph(config, self.device.type, world_size())
        self.size = size_of(config.model)
        if self.device.type == "cpu" and self.size.width >= SIZES["vit_base"].width:
            say(
                f"{network_name(config.model)} on a CPU: a step takes minutes, and at the default "
                "batch tens of GB; --config configs/demo.yaml has a network for a CPU"
            )
        self.precision = from_first(lambda: pick_precision(config.precision, self.device))
        if self.device.type == "cpu" and config.precision == "auto" and self.precision.autocast:
            say(
                f"precision: bf16, {bf16_speedup():.1f} times as fast as fp32 on this CPU "
                "(--precision fp32 brings that back)"
            )
        check_dtype(config, self.precision.name)
        check_sharding(config, self.precision.name, world_size())
        self.data = use_threads(config, self.device)
        self.cache = self._cache()
        self.scored = ValRows(config, manifest, self.data, self.size.image, self.device)
        self.loaders: list[TrainLoader] = []
        self.run = from_first(lambda: Run.start(config, manifest, resume=resume))

    def pretrain(self) -> bool:
        """Run stage 1 on all train rows; False if stopped before its end."""
        options, init = self.config.pretrain, self.config.model.init
        check_pretraining(options, self.manifest.modalities)
        pairs = contrasted_pairs(options, len(self.manifest.modalities))
        if options.consistency_weight and not pairs:
            name = self.manifest.modalities[0]
            say(f"{name} alone: without consistency, whose positives are modalities")
        stage, plan = build_pretraining(
            self.config, self.manifest, len(self.rows), self.precision, self.device
        )
        if init:
            encoders = (stage.model.encoder, stage.model.teacher_encoder)
            say(load_start(self.config.model, encoders))

        def batches(step: int) -> Batches:
            teacher = bool(pairs) and options.teacher_views == "independent"
            loader = self._loader(self.rows, options.batch_size, options, step, teacher=teacher)
            return zip(loader)

        def pictures() -> dict[str, Tensor]:
            batch = self.scored.example()
            strip = reconstruction_strip(stage.model, batch, options.mask_ratio)
            return {"reconstructions": strip}

        shown = pictures if self.config.log.images else None
        validate = self.scored.neighbours(stage, self.precision)
        return self._run(stage, plan, batches, validate, shown)

    def finetune(self) -> bool:
        """Run stage 2; False if stopped before its end."""
        options = self.config.finetune
        if len(self.manifest.modalities) == 1:
            say(f"{self.manifest.modalities[0]} alone: without fusion, agreement and shift")
        labelled = self.rows.where(self.rows.labelled)
        model = build_classifier(self.config, self.manifest)
        kept, config = None, self.config
        if options.encoder == "frozen":
            kept = self._keep_features(model)
        else:
            if not self._start(model.encoders.values()):
                config = as_from_scratch(config)
            adapt(model, options)
        stage, plan = build_finetuning(
            config, self.manifest, model, len(self.rows), self.precision, self.device
        )

        make = self._loader if kept is None else self._feature_loader(kept[0])

        def batches(step: int) -> Batches:
            balanced = options.sampling == "balanced"
            loaders = [make(labelled, options.labelled_batch, options, step, balanced=balanced)]
            if wants_unlabelled(options):
                size = options.unlabelled_batch
                loaders.append(make(self.rows, size, options, step, strong=True))
            return zip(*loaders, strict=True)

        latest: list[Predictions] = []
        validate = self.scored.validation(stage, kept and kept[1], latest)

        def pictures() -> dict[str, Tensor]:
            classes = self.manifest.classes
            drawn = {"confusion": confusion_picture(confusion(latest[-1]), classes)}
            # A stage that reads features takes no images.
            if kept is None and self.config.log.images:
                batch = self.scored.example()
                predictions = collect_opinions(stage.average, [batch]).fused()
                drawn["predictions"] = prediction_strip(batch, predictions, classes)
            return drawn

        return self._run(stage, plan, batches, validate, pictures)

    def _run(
        self,
        stage: PretrainStage | FinetuneStage,
        plan: Plan,
        batches: Callable[[int], Batches],
        validate: Callable[[], dict[str, float]] | None,
        pictures: Callable[[], dict[str, Tensor]] | None,
    ) -> bool:
        """Run a stage from its last checkpoint, or from its beginning."""
        if self.config.model.activation_checkpointing:
            checkpoint_activations(stage)
        start_alike({**dict(stage.named_parameters()), **dict(stage.named_buffers())})
        if self.config.shard_parameters:
            sharers = processes_here() if self.config.shard_across == "machine" else world_size()
            mesh = shard_mesh(self.device, sharers, self.config.timeout_minutes)
            shards = Shards(stage, stage.networks(), plan.optimisers, self.device, mesh)
            plan = replace(plan, shards=shards)
        if self.config.compile == "on" or (
            self.config.compile == "auto" and self.device.type == "cuda"
        ):
            stage.compile_parts(self.config.compile_scope)
        belongs_to = self._identity(plan.name)
        # A sharded network runs on all ranks or on none, and pictures are of the first.
        shown = None if self.config.shard_parameters else pictures
        meta = {**belongs_to, "manifest": self.manifest.digest()}
        checkpoints = self.run.checkpoints(plan.name)
        options = flatten(asdict(self.config))
        log = RunLog(
            self.run.folder,
            verbose=self.verbose,
            options=options,
            trackers=[name for name in TRACKERS if options[f"log.{name}"]],
        )
        try:
            loop = Loop(stage, plan, checkpoints, meta, log, validate, shown)
            state = from_first(lambda: checkpoints.load_latest(belongs_to))
            if state is not None:
                loop.load(state)
            with self.precision.products():
                finished = loop.finished or loop.run(batches)
            if finished and rank() == 0:
                records = read_log(self.run.folder).get(plan.name, [])
                for sentence in closing_warnings(plan.name, records):
                    log.warn(plan.name, sentence)
            return finished
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailed(self._too_large(plan.name)) from None
        finally:
            for loader in self.loaders:
                loader.close()
            log.close()

    def _identity(self, stage: str) -> dict[str, Any]:
        return identity(self.config, self.manifest.modalities, self.manifest.classes, stage)

    def _too_large(self, stage: str) -> str:
        """Describe a step that ran out of memory, and the options to change."""
        options = self.config
        batch = f"pretrain.batch_size {options.pretrain.batch_size}"
        if stage == "finetune":
            sizes = options.finetune.labelled_batch, options.finetune.unlabelled_batch
            batch = "finetune.labelled_batch {} and unlabelled_batch {}".format(*sizes)
        accumulate = getattr(options, stage).accumulate
        return (
            f"{stage} ran out of memory on {self.device} with {batch}, accumulate {accumulate}, "
            f"{network_name(options.model)}; raise {stage}.accumulate (the same batch in smaller "
            "parts), set model.activation_checkpointing true, or lower the batch, data.prefetch, "
            "data.cache.side, model.image or model.size"
        )

    def _cache(self) -> FrameCache | None:
        """Allocate the frame cache of all train rows; both stages share it."""
        if self.config.data.cache.mode == "none":
            return None
        return FrameCache(
            self.rows,
            self.manifest.modalities,
            data=self.data,
            image_size=self.size.image,
            device=self.device,
        )

    def _loader(
        self,
        rows: Sequence[Row],
        batch_size: int,
        options: PretrainConfig | FinetuneConfig,
        step: int,
        *,
        strong: bool = False,
        balanced: bool = False,
        teacher: bool = False,
        alone: bool = False,
    ) -> TrainLoader:
        loader = TrainLoader(
            rows,
            self.manifest.modalities,
            data=self.data,
            augment=options.augment,
            image_size=self.size.image,
            batch_size=batch_size,
            seed=self.config.seed,
            step=step,
            strong=strong,
            balanced=balanced,
            device=self.device,
            rank=0 if alone else rank(),
            world_size=1 if alone else world_size(),
            parts=1 if alone else options.accumulate,
            cache=self.cache,
            teacher=teacher,
        )
        self.loaders.append(loader)
        return loader

    def _start(self, encoders: Iterable[nn.Module]) -> bool:
        """Load encoders from the pre-training that ``finetune.init`` names, else from
        ``model.init``; return whether there is either."""
        encoders = list(encoders)
        checkpoint = from_first(lambda: pretraining_of(self.run))
        if checkpoint is None:
            say("fine-tuning without pre-training")
            if self.config.model.init:
                say(load_start(self.config.model, encoders))
            return bool(self.config.model.init)
        expected = self._identity("pretrain")
        state = from_first(lambda: load_checkpoint(checkpoint, expected))
        with fitting(f"checkpoint {checkpoint}"):
            load_encoders(encoders, weights_of(state, "model.encoder"))
        say(f"fine-tuning from {checkpoint}")
        return True

    def _frozen_encoder(self) -> VisionTransformer:
        """Return the encoder whose features the run reads; a resumed run has its own.

        Raises:
            InputError: there are no weights to start from.
        """
        if from_first(lambda: (self.run.folder / ENCODER).exists()):
            return read_encoder(self.run)
        encoder = self.size.encoder().eval()
        if not self._start([encoder]):
            raise InputError(
                "option finetune.encoder is frozen, wanted weights to start from: model.init, "
                "pre-training, or finetune.init"
            )
        if rank() == 0:
            write_encoder(self.run, encoder)
        return encoder

    def _keep_features(self, model: Classifier) -> tuple[Features, Features]:
        """Compute the features of train and val rows, and set the classifier's standardisation.

        One process computes them for all.
        """
        options, rows, val = self.config.finetune, self.rows, self.scored.rows
        maker = FeatureMaker(
            self._frozen_encoder().to(self.device),
            self.config.model.pool,
            self.precision,
            self.manifest.modalities,
            self.data,
            Path(options.feature_cache) if options.feature_cache else None,
        )
        count = options.augmented_views if wants_unlabelled(options) else 0
        say(f"features of {len(rows)} train rows ({count} augmented views) and {len(val)} val rows")

        def make() -> tuple[Features, Features]:
            plain = maker.plain(self.scored.loader(rows, BATCH), rows)
            stream = partial(self._loader, plain.rows, BATCH, options, 0, strong=True, alone=True)
            train = maker.augmented(stream, plain, count, options.augment, self.config.seed)
            return train, maker.plain(self.scored.loader(val, BATCH), val) if val else train

        train, held = from_first(make)
        for column, (name, own) in enumerate(train.plain.items()):
            encoder = model.encoders[name]
            assert isinstance(encoder, PooledEncoder)
            encoder.standardise(own[train.present[:, column]])
        return train, held

    def _feature_loader(self, kept: Features) -> Callable[..., FeatureLoader]:
        """Return a function that makes loaders of features, like ``_loader`` for images."""

        def make(
            rows: Sequence[Row], batch_size: int, options: FinetuneConfig, step: int, **how: bool
        ) -> FeatureLoader:
            return FeatureLoader(
                FeatureRows(kept, rows, self.device),
                batch_size,
                seed=self.config.seed,
                step=step,
                rank=rank(),
                world_size=world_size(),
                parts=options.accumulate,
                **how,
            )

        return make


def check_labels(manifest: Manifest) -> None:
    """Refuse data for fine-tuning before hours of pre-training.

    Raises:
        InputError: no labelled train row, or only one class.
    """
    if not manifest.select("train", labelled=True):
        raise InputError(f"{manifest.path} has no train row with labelled = 1")
    if len(manifest.classes) < 2:
        raise InputError(
            f"{manifest.path} has one class, {manifest.classes[0]}, wanted at least two in the "
            "column label"
        )


def check_patience(options: FinetuneConfig, manifest: Manifest) -> None:
    """Refuse early stopping without rows to score.

    Raises:
        InputError: no val row has a label.
    """
    if options.patience and not manifest.select("val").known:
        raise InputError(
            f"option finetune.patience is {options.patience}, but {manifest.path} has no val row "
            "with a label to score"
        )
