"""``python -m mics_fast.train``: both stages of MICS, from a manifest to a run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.optim import Optimizer

from mics_fast.config import AugmentConfig, FinetuneConfig, PretrainConfig, TrainConfig
from mics_fast.data.cache import FrameCache
from mics_fast.data.manifest import Manifest, Row, read_manifest
from mics_fast.data.pipeline import EvalLoader, PairBatch, TrainLoader
from mics_fast.engine.checkpoint import Checkpoints, load_checkpoint, weights_of
from mics_fast.engine.log import RunLog
from mics_fast.engine.loop import Loop, Plan
from mics_fast.engine.optimiser import decay_groups
from mics_fast.errors import InputError, run_command
from mics_fast.metrics import view_metrics
from mics_fast.models.classifier import Classifier, check_modality_names
from mics_fast.models.sizes import SIZES
from mics_fast.models.vit import checkpoint_activations
from mics_fast.opinions import collect_opinions
from mics_fast.run import Run, identity, parse_config
from mics_fast.stages.finetune import FinetuneStage, wants_unlabelled
from mics_fast.stages.pretrain import PretrainStage

Batches = Iterator[tuple[PairBatch, ...]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the stages it asks for."""
    config, resume = parse_config(arguments)
    if not config.data.manifest or not config.out:
        missing = "--out" if config.data.manifest else "--data.manifest"
        raise InputError(f"option {missing} is missing")
    manifest = read_manifest(
        Path(config.data.manifest),
        config.data.modalities,
        files_exist=config.data.on_bad_file == "error",
    )
    trainer = Trainer(config, manifest, resume=resume)
    stages = ("pretrain", "finetune") if config.stage == "both" else (config.stage,)
    for stage in stages:
        finished = trainer.pretrain() if stage == "pretrain" else trainer.finetune()
        if not finished:
            print(f"stopped and saved: go on with --resume --out {config.out}")
            return
    print(f"finished: {config.out}")


class Trainer:
    """Builds each stage from the configuration and the manifest, and runs it.

    Args:
        config: the run's options.
        manifest: what to train on.
        resume: go on with the run in ``config.out`` if there is one.

    Raises:
        InputError: nothing to train on, no such device, or a run folder that cannot be used.
    """

    def __init__(self, config: TrainConfig, manifest: Manifest, *, resume: bool) -> None:
        self.config, self.manifest = config, manifest
        self.rows = manifest.select("train")
        if not self.rows:
            raise InputError(f"{manifest.path} has no row with split train")
        check_modality_names(manifest.modalities)
        for name in (*config.data.mean, *config.data.std):
            if name not in manifest.modalities:
                raise InputError(
                    f"option data.mean or data.std names {name}, no modality of the run"
                )
        self.device = pick_device(config.device)
        self.size = SIZES[config.model.size]
        on_gpu = self.device.type == "cuda"
        bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
        self.autocast = torch.bfloat16 if bf16 else None
        if config.data.dtype == "bf16" and not bf16:
            raise InputError("option data.dtype is bf16, wanted fp32 as the encoders run in fp32")
        self.cache = self._cache()
        self.loaders: list[TrainLoader] = []
        self.run = Run.start(config, resume=resume)

    def pretrain(self) -> bool:
        """Stage 1 over all train rows; False where it was asked to stop before its end."""
        options, model = self.config.pretrain, self.config.model
        steps_per_epoch = max(1, len(self.rows) // options.batch_size)
        torch.manual_seed(self.config.seed)
        stage = PretrainStage(
            options,
            self.size,
            self.manifest.modalities,
            pool=model.pool,
            projection=model.projection,
            queue_size=options.queue_size or max(1, min(65536, len(self.rows) // 4)),
            steps_per_epoch=steps_per_epoch,
            seed=self.config.seed,
            autocast=self.autocast,
        ).to(self.device)
        parameters = [(n, p) for n, p in stage.model.named_parameters() if p.requires_grad]
        groups = decay_groups(parameters, lr=options.lr, weight_decay=options.weight_decay)
        optimisers: dict[str, Optimizer] = {"model": torch.optim.AdamW(groups)}
        if options.adversarial_weight:
            optimisers["discriminator"] = torch.optim.Adam(
                stage.discriminator.parameters(), lr=options.discriminator_lr, betas=(0.5, 0.999)
            )
        plan = self._plan(
            "pretrain", options, steps_per_epoch, optimisers, options.lr_final / options.lr
        )

        def batches(step: int) -> Batches:
            return zip(self._loader(self.rows, options.batch_size, options.augment, step))

        return self._run(stage, plan, batches)

    def finetune(self) -> bool:
        """Stage 2; False where it was asked to stop before its end."""
        options = self.config.finetune
        labelled = [row for row in self.rows if row.labelled]
        if not labelled:
            raise InputError(f"{self.manifest.path} has no train row with labelled = 1")
        steps_per_epoch = max(1, len(self.rows) // options.unlabelled_batch)
        steps = options.epochs * steps_per_epoch
        torch.manual_seed(self.config.seed)
        model = Classifier(
            self.size,
            self.manifest.modalities,
            len(self.manifest.classes),
            pool=self.config.model.pool,
            fusion_depth=self.config.model.fusion_depth,
        )
        self._load_encoder(model)
        stage = FinetuneStage(
            options,
            model,
            num_classes=len(self.manifest.classes),
            width=self.size.width,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            seed=self.config.seed,
            autocast=self.autocast,
        ).to(self.device)
        groups = []
        for fresh, lr in ((False, options.lr), (True, options.lr * options.head_lr_factor)):
            named = [
                (name, parameter)
                for name, parameter in model.named_parameters()
                if name.startswith("encoders.") != fresh
            ]
            groups += decay_groups(named, lr=lr, weight_decay=options.weight_decay)
        optimisers: dict[str, Optimizer] = {"model": torch.optim.AdamW(groups)}
        plan = self._plan("finetune", options, steps_per_epoch, optimisers, 0.01)

        def batches(step: int) -> Batches:
            loaders = [self._loader(labelled, options.labelled_batch, options.augment, step)]
            if wants_unlabelled(options):
                size = options.unlabelled_batch
                loaders.append(self._loader(self.rows, size, options.augment, step, strong=True))
            return zip(*loaders, strict=True)

        return self._run(stage, plan, batches, self._validation(stage))

    def _plan(
        self,
        name: str,
        options: PretrainConfig | FinetuneConfig,
        steps_per_epoch: int,
        optimisers: dict[str, Optimizer],
        final_lr: float,
    ) -> Plan:
        steps = options.epochs * steps_per_epoch
        return Plan(
            name=name,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            optimisers=optimisers,
            warmup=round(options.warmup * steps),
            final_lr={"model": final_lr},
            clip=options.clip,
            log_every=self.config.log_every,
            checkpoint_every=self.config.checkpoint_every,
        )

    def _run(
        self,
        stage: PretrainStage | FinetuneStage,
        plan: Plan,
        batches: Callable[[int], Batches],
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> bool:
        """Go on from the stage's last checkpoint, or from its beginning."""
        if self.config.model.activation_checkpointing:
            checkpoint_activations(stage)
        if self.config.compile == "on" or (
            self.config.compile == "auto" and self.device.type == "cuda"
        ):
            stage.compile_parts(self.config.compile_scope)
        meta = identity(self.config, self.manifest, plan.name)
        checkpoints = self.run.checkpoints(plan.name)
        log = RunLog(self.run.folder)
        try:
            loop = Loop(stage, plan, checkpoints, meta, log, validate)
            state = checkpoints.load_latest(meta)
            if state is not None:
                loop.load(state)
            return loop.step == plan.steps or loop.run(batches(loop.step))
        finally:
            for loader in self.loaders:
                loader.close()
            log.close()

    def _cache(self) -> FrameCache | None:
        """Memory for the frames of all train rows, which both stages share."""
        if self.config.data.cache.mode == "none":
            return None
        return FrameCache(
            self.rows,
            self.manifest.modalities,
            data=self.config.data,
            image_size=self.size.image,
            device=self.device,
        )

    def _loader(
        self,
        rows: Sequence[Row],
        batch_size: int,
        augment: AugmentConfig,
        step: int,
        *,
        strong: bool = False,
    ) -> TrainLoader:
        loader = TrainLoader(
            rows,
            self.manifest.modalities,
            data=self.config.data,
            augment=augment,
            image_size=self.size.image,
            batch_size=batch_size,
            seed=self.config.seed,
            step=step,
            strong=strong,
            device=self.device,
            cache=self.cache,
        )
        self.loaders.append(loader)
        return loader

    def _validation(self, stage: FinetuneStage) -> Callable[[], dict[str, float]] | None:
        """Scores of the averaged model on the val rows; None where there are none."""
        rows = [row for row in self.manifest.select("val") if row.label >= 0]
        if not rows:
            return None
        loader = EvalLoader(
            rows,
            self.manifest.modalities,
            data=self.config.data,
            image_size=self.size.image,
            batch_size=self.config.finetune.unlabelled_batch,
            device=self.device,
        )

        def validate() -> dict[str, float]:
            metrics = view_metrics(collect_opinions(stage.average, loader).fused())
            return {f"val_{name}": metrics[name] for name in ("macro_f1", "accuracy")}

        return validate

    def _load_encoder(self, model: Classifier) -> None:
        """Start the encoders from the pre-training that ``finetune.init`` names, if any."""
        checkpoint = pretraining_of(self.run)
        if checkpoint is None:
            print("fine-tuning from scratch")
            return
        state = load_checkpoint(checkpoint, identity(self.config, self.manifest, "pretrain"))
        model.load_encoder(weights_of(state, "model.encoder"))
        print(f"fine-tuning from {checkpoint}")


def pretraining_of(run: Run) -> Path | None:
    """The pre-training that a run's fine-tuning starts from; None: it starts from scratch.

    Raises:
        InputError: ``finetune.init`` names none.
    """
    init = run.config.finetune.init
    if init == "none":
        return None
    return find_pretraining(Path(init)) if init else run.checkpoints("pretrain").latest()


def find_pretraining(path: Path) -> Path:
    """The checkpoint folder that a run folder, a checkpoint folder or its state.pt names.

    Raises:
        InputError: there is none.
    """
    if path.name == "state.pt":
        path = path.parent
    if (path / "meta.json").exists():
        return path
    latest = Checkpoints(path / "checkpoints" / "pretrain").latest()
    if latest is None:
        raise InputError(f"finetune.init {path} holds no pre-training checkpoint")
    return latest


def pick_device(name: str) -> torch.device:
    """The device an option names.

    Raises:
        InputError: "cuda" where there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("option device is cuda, but torch sees no GPU")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


if __name__ == "__main__":
    run_command(main)
