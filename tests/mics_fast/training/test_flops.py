"""The closed forms count what PyTorch counts when the modules run."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mics_fast.models.classifier import Classifier
from mics_fast.models.discriminator import Discriminator, SpectralLinear
from mics_fast.models.sizes import SIZES
from mics_fast.models.vit import VisionTransformer
from mics_fast.options import FinetuneConfig, ModelConfig, PretrainConfig, TrainConfig
from mics_fast.stages.finetune import FinetuneStage
from mics_fast.stages.pretrain import PretrainStage
from mics_fast.training.build import adapt
from mics_fast.training.flops import discriminator, encoder, finetune_flops, pretrain_flops

MODELS = [ModelConfig(pool=pool, projection=8, fusion_depth=2) for pool in ("mean", "cls")]


def counted(run):
    """Count the FLOPs of ``run`` by PyTorch, with plain attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(autouse=True)
def reference_operators(monkeypatch):
    """Operators as formulas: PyTorch cannot count what runs in a native one."""
    monkeypatch.setenv("MICS_KERNELS_BACKEND", "reference")


def padding(size, images, patches=None):
    """The products with the columns that L2 attention adds to fit the fused kernels: a forward."""
    width = size.discriminator_width // size.discriminator_heads
    columns = (1 + (-(width + 1) % 4)) * size.discriminator_heads
    tokens = 1 + (patches or size.num_patches)
    return 4 * tokens * (tokens * (size.discriminator_depth - 1) + 1) * columns * images


def make_discriminator(size):
    return Discriminator(
        size.num_patches,
        size.patch_dim,
        size.discriminator_width,
        size.discriminator_depth,
        size.discriminator_heads,
    )


@pytest.fixture(params=MODELS, ids=lambda model: model.pool)
def model(request):
    return request.param


def make_pretrain_stage(options, size, model):
    return PretrainStage(
        options, size, ("wli", "nbi"), pool=model.pool, projection=model.projection,
        queue_size=options.queue_size, steps_per_epoch=4, seed=0,
    )  # fmt: skip


def step(stage, batch):
    for losses in stage.losses(batch, torch.tensor(1)):
        losses.total().backward()


@pytest.mark.parametrize("name", SIZES)
def test_the_encoder_costs_what_it_runs(name):
    size = SIZES[name]
    with torch.device("meta"):
        model = VisionTransformer(size.image, size.patch, size.width, size.depth, size.heads)
        images = torch.zeros(2, 3, size.image, size.image)
        visible = torch.zeros(2, size.num_patches // 4, dtype=torch.int64)
    whole, part = encoder(size, size.num_patches) * 2, encoder(size, size.num_patches // 4) * 2
    assert counted(lambda: model(images).sum().backward()) == whole.trained()
    assert counted(lambda: model(images, visible).sum().backward()) == part.trained()
    model.requires_grad_(False)
    assert counted(lambda: model(images)) == whole.forward()


def test_vit_base_costs_what_its_authors_say():
    """55.5 G multiply-adds at 384 px (timm's table)."""
    size = SIZES["vit_base"]
    assert encoder(size, size.num_patches).forward() / 2e9 == pytest.approx(55.5, rel=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_the_discriminator_costs_what_it_runs(name, monkeypatch):
    # Spectral norms are products of vectors, which nobody counts; without arithmetic there is none.
    monkeypatch.setattr(SpectralLinear, "effective_weight", lambda layer: layer.weight)
    size = SIZES[name]
    work, extra = discriminator(size, size.num_patches) * 2, padding(size, 2)
    with FakeTensorMode():
        model = make_discriminator(size)
        patches = torch.zeros(2, size.num_patches, size.patch_dim)
        assert counted(lambda: model(patches).sum().backward()) == work.trained() + 3 * extra
        model.requires_grad_(False)
        patches.requires_grad_()
        assert counted(lambda: model(patches)) == work.forward() + extra
        through = counted(lambda: model(patches).sum().backward())
        assert through == work.passed_through() + 3 * extra


@pytest.mark.parametrize(
    "options",
    [{}, {"adversarial": "alternating"}, {"preset": "turbo"}, {"adversarial_weight": 0.0},
     {"reconstruction_weight": 0.0}],
)  # fmt: skip
def test_a_pre_training_step_costs_what_it_runs(tiny, make_batch, model, options):
    config = PretrainConfig(batch_size=4, queue_size=32, **{"adversarial_weight": 0.1, **options})
    stage = make_pretrain_stage(config, tiny, model)
    patches = tiny.num_patches // 4 if config.preset == "turbo" else tiny.num_patches
    extra = 0
    if config.adversarial == "alternating":
        extra += (3 * 2 + 3) * padding(tiny, 8, patches)
    elif config.adversarial_weight:  # real patches share the pass that gives fakes a gradient
        extra += 3 * 2 * padding(tiny, 8, patches) + discriminator(tiny, patches).first * 8
    flops = pretrain_flops(TrainConfig(model=model, pretrain=config), tiny, 2)
    assert counted(lambda: step(stage, (make_batch(4),))) == sum(flops.values()) + extra


def test_a_term_that_is_off_costs_nothing(tiny):
    def terms(**options):
        config = TrainConfig(
            pretrain=PretrainConfig(batch_size=4, **{"adversarial_weight": 0.1, **options})
        )
        return set(pretrain_flops(config, tiny, 2))

    everything = {"consistency", "teacher", "reconstruction", "discriminator", "adversarial"}
    assert terms() == everything
    assert terms(consistency_weight=0.0) == everything - {"consistency", "teacher"}
    assert terms(adversarial_weight=0.0) == everything - {"discriminator", "adversarial"}
    assert terms(reconstruction_weight=0.0) == everything  # the discriminator judges its output
    assert terms(reconstruction_weight=0.0, adversarial_weight=0.0) == {"consistency", "teacher"}


@pytest.mark.parametrize(
    "options",
    [{}, {"unlabelled_weight": 0.0}, {"shift": "none"}, {"shift_weight": 0.0},
     {"unlabelled_weight": 0.0, "modality_consistency_weight": 0.0},
     {"encoder": "lora", "lora_rank": 3}],
)  # fmt: skip
def test_a_fine_tuning_step_costs_what_it_runs(tiny, make_batch, model, options):
    config = FinetuneConfig(labelled_batch=3, unlabelled_batch=5, **options)
    classifier = Classifier(tiny, ("wli", "nbi"), 3, pool=model.pool, fusion_depth=2)
    adapt(classifier, config)
    stage = FinetuneStage(config, classifier, num_classes=3, width=tiny.width, steps=100, seed=0)
    flops = finetune_flops(TrainConfig(model=model, finetune=config), tiny, 2, 3)
    batch = (make_batch(3), make_batch(5, strong=True))[: 2 if "unlabelled" in flops else 1]
    assert counted(lambda: step(stage, batch)) == sum(flops.values())
