"""The classifier: one opinion per modality and their fusion; absent ones have no influence."""

import pytest
import torch
import torch.nn.functional as F

from mics_fast.common.errors import InputError
from mics_fast.models.classifier import Classifier
from mics_fast.models.pretraining import PretrainModel
from mics_fast.models.sizes import Size

TINY = Size(16, 4, 16, 2, 2, 8, 1, 2, 16, 1, 2)
PAIR = ("wli", "nbi")
TRIPLE = ("wli", "nbi", "uv")
POOLS = pytest.mark.parametrize("pool", ["cls", "mean"])
NAN = float("nan")


def tiny_classifier(modalities=PAIR, pool="cls", size=TINY, classes=5) -> Classifier:
    torch.manual_seed(0)
    return Classifier(size, modalities, classes, pool=pool, fusion_depth=2)


def tiny_views(modalities=PAIR, batch=4, side=16):
    generator = torch.Generator().manual_seed(1)
    return {m: torch.randn(batch, 3, side, side, generator=generator) for m in modalities}


def all_present(modalities=PAIR, batch=4) -> torch.Tensor:
    return torch.ones(batch, len(modalities), dtype=torch.bool)


def fused_vacuity(logits: torch.Tensor) -> torch.Tensor:
    """Uncertainty of the opinions' Dempster combination, in closed form."""
    classes = logits.shape[-1]
    fused = classes * ((1 + F.softplus(logits) / classes).prod(dim=1) - 1)
    return classes / (classes + fused.sum(dim=-1))


# -- views


@POOLS
def test_every_modality_and_their_fusion_state_an_opinion(pool):
    model = tiny_classifier(pool=pool)
    output = model(tiny_views(), all_present())
    assert model.views == ("wli", "nbi", "fusion")
    assert output.logits.shape == (4, 3, 5)
    assert output.logits.dtype == output.fusion_feature.dtype == torch.float32
    assert output.fusion_feature.shape == (4, 16)
    assert output.present.all()


@POOLS
def test_a_single_modality_has_no_fusion(pool):
    model = tiny_classifier(("wli",), pool)
    output = model(tiny_views(("wli",)), all_present(("wli",)))
    assert model.views == ("wli",)
    assert output.logits.shape == (4, 1, 5)
    assert output.fusion_feature is None
    assert not any("fusion" in name for name in model.state_dict())


def test_the_fusion_is_present_from_two_modalities_on():
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    output = tiny_classifier(TRIPLE)(tiny_views(TRIPLE), present)
    assert torch.equal(output.present[:, :3], present)
    assert output.present[:, 3].tolist() == [True, True, False, False]


@POOLS
@pytest.mark.parametrize("modality", PAIR)
def test_the_fusion_reads_every_present_modality(pool, modality):
    model, views = tiny_classifier(pool=pool), tiny_views()
    before = model(views, all_present()).fusion_feature
    views[modality] = views[modality].flip(0)
    assert (model(views, all_present()).fusion_feature - before).abs().amax(dim=1).min() > 1e-3


def test_the_fusion_tells_the_modalities_apart():
    model, views = tiny_classifier(), tiny_views()
    model.encoders["nbi"].load_state_dict(model.encoders["wli"].state_dict())
    swapped = {"wli": views["nbi"], "nbi": views["wli"]}
    change = (
        model(swapped, all_present()).fusion_feature - model(views, all_present()).fusion_feature
    )
    assert change.abs().max() > 1e-4


@POOLS
def test_the_fusion_head_reads_the_fusion_feature(pool):
    model = tiny_classifier(pool=pool)
    output = model(tiny_views(), all_present())
    torch.testing.assert_close(model.fusion_logits(output.fusion_feature), output.logits[:, 2])


def test_samples_do_not_depend_on_their_batch():
    model, views = tiny_classifier(), tiny_views()
    output = model(views, all_present())
    alone = model({m: v[2:3] for m, v in views.items()}, all_present(batch=1))
    torch.testing.assert_close(alone.logits, output.logits[2:3])


# -- what is absent


def outputs_and_gradients(model, views, present):
    output = model(views, present)
    said = output.logits * torch.linspace(0.5, 1.5, 5)
    loss = torch.where(output.present.unsqueeze(-1), said, 0).sum()
    loss = loss + torch.where(output.present[:, -1:], output.fusion_feature, 0).square().sum()
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return output, gradients


@POOLS
@pytest.mark.parametrize("junk", [NAN, float("inf"), 7.0])
def test_the_images_of_an_absent_modality_change_nothing(pool, junk):
    model, views = tiny_classifier(TRIPLE, pool), tiny_views(TRIPLE)
    present = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    output, gradients = outputs_and_gradients(model, views, present)
    for column, modality in enumerate(TRIPLE):
        views[modality][~present[:, column]] = junk
    poisoned, poisoned_gradients = outputs_and_gradients(model, views, present)
    assert torch.equal(poisoned.logits, output.logits)
    assert torch.equal(poisoned.fusion_feature, output.fusion_feature)
    assert output.logits.isfinite().all()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(poisoned_gradients[name], gradient), name


@POOLS
def test_a_modality_absent_everywhere_is_as_good_as_not_there(pool):
    three, two = tiny_classifier(TRIPLE, pool), tiny_classifier(PAIR, pool)
    state = three.state_dict()
    shared = {name: state[name] for name in two.state_dict()}
    shared["fusion.modality_embed"] = state["fusion.modality_embed"][:2]
    two.load_state_dict(shared)
    present = all_present(TRIPLE)
    present[:, 2] = False
    output, expected = three(tiny_views(TRIPLE), present), two(tiny_views(), all_present())
    torch.testing.assert_close(output.fusion_feature, expected.fusion_feature)
    torch.testing.assert_close(output.logits[:, [0, 1, 3]], expected.logits)


@POOLS
def test_an_absent_modality_gets_no_gradient(pool):
    model, present = tiny_classifier(pool=pool), all_present()
    present[:, 1] = False
    _, gradients = outputs_and_gradients(model, tiny_views(), present)
    silent = [name for name in gradients if name.startswith(("encoders.nbi", "heads.nbi"))]
    assert silent
    assert not any(gradients[name].any() for name in silent)


# -- the untrained model


@POOLS
@pytest.mark.parametrize("width", [128, 768])
def test_an_untrained_model_accepts_no_pseudo_label(pool, width):
    size = Size(16, 4, width, 2, 4, 8, 1, 2, 16, 1, 2)
    model = tiny_classifier(pool=pool, size=size, classes=8)
    with torch.no_grad():
        vacuity = fused_vacuity(model(tiny_views(batch=16), all_present(batch=16)).logits)
    assert vacuity.min() > 0.9  # a pseudo-label needs at most 0.3
    assert vacuity.mean() == pytest.approx(0.95, abs=0.02)


# -- the start from pre-training


def test_every_encoder_starts_from_the_pre_trained_one():
    torch.manual_seed(3)
    shared = PretrainModel(TINY, PAIR, pool="cls", projection=6, temperature=0.07).encoder
    model = tiny_classifier()
    model.load_encoder(shared.state_dict())
    for encoder in model.encoders.values():
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, shared.state_dict()[name])
    first, second = (encoder.norm.weight for encoder in model.encoders.values())
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pos_embed": torch.zeros(1, 5, 16)}, r"pos_embed is \(1, 5, 16\), wanted \(1, 17, 16\)"),
        ({"head.weight": torch.zeros(3)}, r"head.weight is \(3,\), wanted absent"),
        ({"norm.bias": None}, r"norm.bias is absent, wanted \(16,\)"),
    ],
    ids=["another size", "left over", "missing"],
)
def test_an_encoder_that_does_not_fit_is_told_in_one_sentence(change, sentence):
    model = tiny_classifier()
    state = model.encoders["wli"].state_dict() | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(InputError, match=sentence):
        model.load_encoder(state)


@pytest.mark.parametrize("name", ["fusion", "nbi.v2", "keys"])
def test_a_modality_cannot_have_a_reserved_name(name):
    with pytest.raises(InputError, match=f'^"{name}" cannot be the name of a modality'):
        tiny_classifier(("wli", name))


@POOLS
@pytest.mark.parametrize("modalities", [("wli",), PAIR], ids=len)
def test_every_parameter_learns(pool, modalities):
    model = tiny_classifier(modalities, pool)
    model(tiny_views(modalities), all_present(modalities)).logits.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


# -- arithmetic


def test_logits_are_float32_under_bfloat16_autocast():
    model, views = tiny_classifier(), tiny_views()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(views, all_present())
        again = model.fusion_logits(output.fusion_feature)
    assert output.logits.dtype == output.fusion_feature.dtype == again.dtype == torch.float32
    assert torch.equal(again, output.logits[:, 2])
    exact = model(views, all_present()).logits
    assert (output.logits - exact).abs().max() < 0.006  # measured: 0.0013


def test_compiles_into_one_graph():
    model, views = tiny_classifier(), tiny_views()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    present = all_present()
    present[1, 0] = False
    expected = model(views, present)
    output = compiled(views, present)
    torch.testing.assert_close(output.logits, expected.logits)
    assert torch.equal(output.present, expected.present)
