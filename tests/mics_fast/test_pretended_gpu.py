"""The trainer on a pretended GPU (pretence.py): its requests to the device, without hardware."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvidia import dali
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from mics_fast.data import cache, decoding
from mics_fast.data.augmentation import draw_augmentation
from mics_fast.data.batch import Sample
from mics_fast.data.cache import FrameCache
from mics_fast.data.decoding import PairGraph, decoded
from mics_fast.data.image_files import ImageFiles
from mics_fast.data.stream import Prepared, Stream
from mics_fast.engine.loop import Loop
from mics_fast.engine.precision import pick_precision
from mics_fast.engine.update import Update
from mics_fast.evaluation.opinions import state_opinions
from mics_fast.models.discriminator import SpectralLinear
from mics_fast.models.sizes import SIZES
from mics_fast.models.vit import Attention, checkpoint_activations
from mics_fast.options import (
    AugmentConfig,
    CacheConfig,
    ColourConfig,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
)
from mics_fast.stages import finetune
from mics_fast.training.build import build_classifier, build_finetuning, build_pretraining
from mics_fast.training.neighbours import extract_features
from tests.mics_fast.pretence import GPU, STREAM, Stray, Watch, launched, pretended_gpu


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The pretence; it ends with this file."""
    with pretended_gpu(tmp_path_factory.mktemp("streams")) as device:
        yield device


MANIFEST = SimpleNamespace(modalities=("wli", "nbi"), classes=("a", "b", "c"))
ALONE = SimpleNamespace(modalities=("wli",), classes=("a", "b", "c"))


@pytest.fixture
def build(gpu, tiny, monkeypatch):
    """build(stage, ...) -> the stage and its plan, as ``train`` builds them for a GPU."""
    monkeypatch.setitem(SIZES, "vit_micro", tiny)

    def make(stage, *, precision="bf16", manifest=MANIFEST, **options):
        config = TrainConfig(
            precision=precision,
            model=ModelConfig(size="vit_micro", projection=8, fusion_depth=1),
            pretrain=PretrainConfig(batch_size=4, adversarial_weight=0.1),
            finetune=FinetuneConfig(labelled_batch=2, unlabelled_batch=4, shift_rank=2),
        )
        for name, value in options.items():
            setattr(getattr(config, stage), name, value)
        chosen = pick_precision(precision, gpu)
        with unset_fake_temporarily():  # weights are drawn on a CPU
            if stage == "pretrain":
                return build_pretraining(config, manifest, 64, chosen, gpu)
            model = build_classifier(config, manifest)
            return build_finetuning(config, manifest, model, 64, chosen, gpu)

    return make


class Pipeline:
    """Replaces the DALI pipeline: outputs squares, and records the consuming streams."""

    def __init__(self, outputs, rows, side):
        self.shape, self.outputs, self.streams = (rows, side, side, 3), outputs, []

    def run(self, stream=None, **inputs):
        self.streams.append(stream)
        return [self] * self.outputs

    def to_torch(self, device):
        """Copy an output as ``to_torch`` does."""
        return torch.empty(self.shape, dtype=torch.uint8, device=device)


def stream_of(rows, *, modalities=("wli", "nbi"), strong=False, teacher=False, missing=False):
    """Return the loader's stream of some samples on a GPU, and its replacement of DALI."""
    augment = AugmentConfig(weak=ColourConfig(blur=1.0))
    side = SIZES["vit_micro"].image
    graph = PairGraph(modalities, DataConfig(), side, GPU, augment, strong, teacher=teacher)
    samples = []
    for number in range(rows):
        drawn = {
            view: draw_augmentation(
                augment, seed=0, epoch=0, sample_id=number, modalities=len(modalities),
                teacher=view == "teacher",
            )
            for view in graph.views
        }  # fmt: skip
        present = np.ones(len(modalities), bool)
        if missing:  # an image of the second row, and all of the first, which is left out
            present[number % len(modalities)] = number > 1
            present &= number > 0
        row = SimpleNamespace(label=number % 3, labelled=True, index=number, group=number)
        crop = graph.crop(drawn)
        samples.append(Sample(row, present, [], graph.numbers(drawn, crop), crop, drawn, []))
    pipeline = Pipeline(len(modalities) * len(graph.blurred), rows, side)

    def build(self, images, numbers, batch_size):
        images(0)
        return pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairGraph, "build", build)
        made = Stream(graph, ImageFiles("error", GPU, "dali"), lambda _: Prepared(samples), rows, 0)
        made._build()
    return made, pipeline


def batch_of(rows, **options):
    return next(stream_of(rows, **options)[0])


def parts_of(stage, **options):
    """A step's argument as the loop passes it."""
    if stage == "pretrain":
        return (batch_of(4, **options),)
    return batch_of(2, **options), batch_of(4, strong=True, **options)


def on_gpu(values):
    return {x.device.type for x in tree_leaves(values) if isinstance(x, Tensor)} == {"cuda"}


def step(stage, plan, batch, steps=2):
    """Run steps of the real update; return their values."""
    launched.clear()
    update = Update(stage, plan)
    with Watch():
        for number in range(steps):
            values = update(batch, number)
    assert on_gpu(update.guard.first_steps())
    tensors = [v for v in values.values() if isinstance(v, Tensor)]
    assert on_gpu(tensors) and all(v.dim() == 0 for v in tensors)
    return values


PRETRAIN = [
    {"preset": preset, "adversarial": how}
    for preset in ("paper", "turbo")
    for how in ("simultaneous", "alternating")
] + [{"accumulate": 2}]
FINETUNE = [
    {"shift": "none"}, {"shift": "diagonal"}, {"shift": "low-rank"}, {"shift": "closed-form"},
    {"modality_dropout": 0.5, "accumulate": 2}, {"unlabelled_weight": 0.0},
]  # fmt: skip
STAGES = [("pretrain", o) for o in PRETRAIN] + [("finetune", o) for o in FINETUNE]
SHIFTS = {
    "diagonal": {"shift_kernel", "moments_kernel"}, "low-rank": {"combine_kernel"},
    "closed-form": {"bound_kernel"},
}  # fmt: skip


@pytest.mark.parametrize("missing", [False, True])
def test_a_batch_is_handed_over_without_a_wait(gpu, tiny, monkeypatch, missing):
    monkeypatch.setitem(SIZES, "vit_micro", tiny)
    batch_of(4)  # mean and standard deviation get there once
    stream, pipeline = stream_of(4, strong=True, missing=missing)
    with Watch():
        batch = next(stream)
    assert pipeline.streams == [STREAM]  # else the host would wait for DALI's work
    assert on_gpu(vars(batch)) and len(batch.label) == 4 - missing
    assert {x.dtype for x in (*batch.views.values(), *batch.strong.values())} == {torch.float32}


@pytest.mark.parametrize(("mode", "device"), [("device", "cuda"), ("host", "cpu")])
def test_frames_are_kept_where_they_were_asked_to_be(gpu, monkeypatch, mode, device):
    data = DataConfig(cache=CacheConfig(mode, side=8))
    rows = [SimpleNamespace(index=k, files={"wli": "a", "nbi": None}) for k in range(3)]
    frames = FrameCache(rows, ("wli", "nbi"), data=data, image_size=8, device=GPU)
    pipeline = Pipeline(1, len(rows), frames.side)
    monkeypatch.setattr(frames, "_build", lambda: pipeline)
    monkeypatch.setattr(cache.ImageFiles, "read", lambda self, row, name: (row.files[name], ""))
    with Watch(reads=mode == "host"):
        frames.fill(rows)
    assert pipeline.streams == [STREAM] and frames._frames.device.type == device
    assert frames.frame(rows[0], "nbi") == (None, "")
    if mode == "device":
        assert frames.frame(rows[0], "wli")[0].device.type == frames.blank().device.type == device


@pytest.mark.parametrize("kept", [None, torch.device("cpu"), GPU], ids=str)
def test_dali_takes_the_graph_of_a_gpu(gpu, monkeypatch, kept):
    outputs = []
    monkeypatch.setattr(dali.Pipeline, "set_outputs", lambda self, *nodes: outputs.extend(nodes))
    monkeypatch.setattr(dali.Pipeline, "build", lambda self: None)  # which needs a driver
    graph = PairGraph(("wli", "nbi"), DataConfig(threads=1), 8, GPU, AugmentConfig(), True, kept)
    graph.build(lambda batch: [], lambda batch: [], 4)
    assert [node.device for node in outputs] == ["gpu"] * 4  # two modalities, plain and blurred


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_the_teacher_s_view_is_resized_from_the_frames_of_the_student_s(gpu, monkeypatch, blur):
    outputs, decodes = [], []
    monkeypatch.setattr(dali.Pipeline, "set_outputs", lambda self, *nodes: outputs.extend(nodes))
    monkeypatch.setattr(dali.Pipeline, "build", lambda self: None)
    original = decoding.decoded
    monkeypatch.setattr(decoding, "decoded", lambda *a: decodes.append(a) or original(*a))
    augment = AugmentConfig(weak=ColourConfig(blur=blur))
    graph = PairGraph(("wli", "nbi"), DataConfig(threads=1), 8, GPU, augment, teacher=True)
    graph.build(lambda batch: [], lambda batch: [], 4)
    assert len(decodes) == 2
    frames = graph.frames_of(outputs)
    found = [n.name.strip("_").split("_")[0] for v in ("weak", "teacher") for n in frames[v]]
    assert found == ["GaussianBlur" if blur else "Resize"] * 4
    assert len({id(node) for view in frames.values() for node in view}) == 4


def test_a_gpu_makes_the_pixels_of_a_jpeg_that_a_cpu_makes(gpu):
    with dali.Pipeline(batch_size=1, num_threads=1, device_id=0):
        decoder = decoded(dali.fn.external_source(name="encoded"), GPU).source
    assert "device: mixed" in str(decoder.spec)
    assert "jpeg_fancy_upsampling: True" in str(decoder.spec)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_step_of_any_precision_waits_for_nothing(build, stage, precision):
    made, plan = build(stage, precision=precision)
    seen = {Attention: set(), SpectralLinear: set()}
    for module in made.modules():
        for kind, dtypes in seen.items():
            if isinstance(module, kind):
                module.register_forward_hook(lambda _, x, y, d=dtypes: d.add(y.dtype))
    step(made, plan, parts_of(stage))
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert seen[Attention] == {half}
    assert seen[SpectralLinear] == ({torch.float32} if stage == "pretrain" else set())
    assert {p.grad.dtype for p in made.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(("stage", "options"), STAGES, ids=str)
def test_a_step_of_any_kind_waits_for_nothing(build, stage, options):
    made, plan = build(stage, **options)
    step(made, plan, parts_of(stage))
    assert on_gpu(made.state_dict())
    own = {"sweep_kernel"} if stage == "pretrain" else {"evidential_rows_kernel"}
    assert own | SHIFTS.get(options.get("shift"), set()) <= launched


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_one_modality_alone_waits_for_nothing(build, stage):
    made, plan = build(stage, manifest=ALONE)
    step(made, plan, parts_of(stage, modalities=("wli",)))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_activations_computed_once_more_wait_for_nothing(build, stage):
    made, plan = build(stage)
    checkpoint_activations(made)
    step(made, plan, parts_of(stage))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_what_a_checkpoint_holds_goes_back_to_where_it_was(build, stage, monkeypatch):
    """Save and load a state as ``Loop`` does, through main memory."""
    made, plan = build(stage, precision="fp16")
    step(made, plan, parts_of(stage))
    optimisers = {name: own.state_dict() for name, own in plan.optimisers.items()}
    scaler = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
              "_growth_tracker": 3}  # fmt: skip
    state = {"step": 2, "stage": made.state_dict(), "optimisers": optimisers, "scaler": scaler,
             "rng": None, "seconds": 1.0, "skipped_steps": 0.0}  # fmt: skip
    saved = tree_map_only(Tensor, lambda x: x.cpu(), state)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)

    again, planned = build(stage, precision="fp16")
    Loop(again, planned, None, {}, None).load(saved)
    step(again, planned, parts_of(stage))
    assert on_gpu(again.state_dict())
    for name, own in planned.optimisers.items():
        there = own.state_dict()  # its groups, too, where a rate is a tensor
        assert on_gpu(there) and there["state"].keys() == optimisers[name]["state"].keys()


@pytest.mark.parametrize("hide", [False, True])
def test_opinions_end_in_main_memory(build, hide):
    made, _ = build("finetune")
    with Watch(reads=True):
        opinions = state_opinions(made.average.eval(), batch_of(4), hide=hide)
    tensors = [x for x in tree_leaves(vars(opinions)) if isinstance(x, Tensor)]
    assert {x.device.type for x in tensors} == {"cpu"}


def test_features_of_neighbours_stay_on_the_gpu(build):
    made, _ = build("pretrain")
    with Watch():
        features = extract_features(made.model, [batch_of(4), batch_of(3)], torch.bfloat16)
        assert on_gpu(vars(features)) and features.values.dtype == torch.float32
        assert on_gpu(features.mean())


@pytest.mark.parametrize(
    ("planted", "error"),
    [
        (lambda x: x + torch.ones(4), Exception),
        (lambda x: x * torch.tensor(2.0), Stray),
        (lambda x: x + torch.tensor(2.0, device=GPU), Stray),
        (lambda x: x + torch.ones(4).to(GPU), Stray),
        (lambda x: x + torch.ones(4).to(GPU, non_blocking=True), Stray),
        (lambda x: x + torch.ones(4).pin_memory().to(GPU), Stray),
        (lambda x: x[[0, 1]], Stray),
        (lambda x: x.cpu(), Stray),
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool(x.sum() > 0), DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
    ],
)
def test_the_watch_sees_what_it_is_there_for(gpu, planted, error):
    values = torch.ones(4, device=GPU)
    with Watch():
        values + torch.ones(4).pin_memory().to(GPU, non_blocking=True)
        with pytest.raises(error):
            planted(values)


def test_a_bug_in_the_step_is_seen_there(build, monkeypatch):
    made, plan = build("finetune")
    batch = parts_of("finetune")
    ones = [1.0] * len(made.ramp_ends)
    monkeypatch.setattr(finetune, "ramps", lambda step, ends: torch.tensor(ones, device=GPU))
    with pytest.raises(Stray, match="waits for the GPU"):
        step(made, plan, batch)
