"""The pre-training model: one forward without side effects, and a teacher that only follows."""

import copy

import pytest
import torch

from mics_fast.common.errors import InputError
from mics_fast.models.discriminator import Discriminator
from mics_fast.models.masked_autoencoder import patch_targets, random_mask
from mics_fast.models.pretraining import PretrainModel, PretrainOutput, paste_patches
from mics_fast.models.sizes import Size
from mics_fast.models.vit import take_rows

TINY = Size(16, 4, 16, 2, 2, 8, 2, 2, 16, 1, 2)
PAIR = ("wli", "nbi")


def tiny_model(modalities=PAIR, pool="cls") -> PretrainModel:
    torch.manual_seed(0)
    return PretrainModel(TINY, modalities, pool=pool, projection=6, temperature=0.07)


def tiny_batch(modalities=PAIR, batch=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(batch)
    views = {m: torch.randn(batch, 3, 16, 16, generator=generator) for m in modalities}
    masks = {
        m: random_mask((0, 0), ids, 0, TINY.num_patches, 0.75, stream)
        for stream, m in enumerate(modalities)
    }
    return views, masks


def everything(output: PretrainOutput) -> dict[str, torch.Tensor]:
    return {f"{kind}.{m}": t for kind, per in vars(output).items() for m, t in per.items()}


def loss_of(output: PretrainOutput) -> torch.Tensor:
    direction = torch.linspace(-1, 1, 6)
    consistency = sum((feature @ direction).sum() for feature in output.features.values())
    return consistency + sum(guess.square().mean() for guess in output.predictions.values())


def update_student(model: PretrainModel) -> None:
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.projection_head.parameters()):
            parameter.add_(torch.randn_like(parameter))


# -- the forward


@pytest.mark.parametrize("modalities", [("wli",), PAIR, ("wli", "nbi", "uv")], ids=len)
def test_every_modality_gets_every_output(modalities):
    views, masks = tiny_batch(modalities)
    output = tiny_model(modalities)(views, masks)
    for m in modalities:
        assert output.features[m].shape == output.teachers[m].shape == (3, 6)
        assert output.predictions[m].shape == (3, 12, 48)
        assert output.targets[m].shape == (3, 16, 48)
        for kind in (output.features, output.teachers, output.predictions, output.targets):
            assert kind[m].dtype == torch.float32
        assert torch.equal(output.hidden[m], masks[m][1])
        torch.testing.assert_close(output.targets[m], patch_targets(views[m], 4))
        torch.testing.assert_close(output.features[m].norm(dim=1), torch.ones(3))
        torch.testing.assert_close(output.teachers[m].norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_modality_is_encoded_as_if_it_were_alone(pool):
    model, (views, masks) = tiny_model(pool=pool), tiny_batch()
    together = model(views, masks)
    alone = copy.deepcopy(model)
    alone.modalities = ("nbi",)
    output = alone({"nbi": views["nbi"]}, {"nbi": masks["nbi"]})
    for kind in ("features", "teachers", "predictions", "targets", "hidden"):
        torch.testing.assert_close(getattr(output, kind)["nbi"], getattr(together, kind)["nbi"])


def test_modalities_are_told_apart_by_name_not_by_order():
    model, (views, masks) = tiny_model(), tiny_batch()
    output = everything(model(views, masks))
    reordered = everything(model(dict(reversed(views.items())), dict(reversed(masks.items()))))
    assert all(torch.equal(output[name], reordered[name]) for name in output)


def test_a_forward_changes_nothing():
    model, (views, masks) = tiny_model(), tiny_batch()
    update_student(model)  # a teacher that differs could move
    before = copy.deepcopy(model.state_dict())
    first, second = everything(model(views, masks)), everything(model(views, masks))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_trainable_parameter_learns_but_the_temperature():
    model, (views, masks) = tiny_model(), tiny_batch()
    loss_of(model(views, masks)).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert without == ["theta"]


def test_outputs_are_float32_under_bfloat16_autocast():
    model, (views, masks) = tiny_model(), tiny_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(views, masks)
    exact = everything(model(views, masks))
    for name, tensor in everything(output).items():
        assert tensor.dtype == exact[name].dtype, name
        assert (tensor - exact[name]).abs().max() < 0.1, name  # measured: 0.02
    loss_of(output).backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())


def test_compiles_into_one_graph():
    model, (views, masks) = tiny_model(), tiny_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = everything(model(views, masks))
    for name, tensor in everything(compiled(views, masks)).items():
        torch.testing.assert_close(tensor, expected[name])


# -- the teacher


def test_the_teacher_has_no_decoder():
    teacher = [name for name in tiny_model().state_dict() if name.startswith("teacher")]
    assert {name.split(".")[0] for name in teacher} == {"teacher_encoder", "teacher_projection"}
    assert not any("decoder" in name for name in teacher)


def test_the_teacher_starts_as_the_student():
    output = tiny_model()(*tiny_batch())
    for m in PAIR:
        assert torch.equal(output.teachers[m], output.features[m])


def test_the_teacher_gets_no_gradient():
    model, (views, masks) = tiny_model(), tiny_batch()
    views = {m: images.requires_grad_() for m, images in views.items()}
    output = model(views, masks)
    loss_of(output).backward()
    assert not any(teacher.requires_grad for teacher in output.teachers.values())
    for name, parameter in model.named_parameters():
        if name.startswith("teacher"):
            assert not parameter.requires_grad
            assert parameter.grad is None


def test_the_teacher_moves_only_when_it_is_updated():
    model, (views, masks) = tiny_model(), tiny_batch()
    before = model(views, masks).teachers["wli"]
    update_student(model)
    output = model(views, masks)
    assert torch.equal(output.teachers["wli"], before)
    assert not torch.equal(output.features["wli"], before)


def test_an_update_moves_every_teacher_parameter_by_the_momentum():
    model = tiny_model()
    update_student(model)
    old = copy.deepcopy(model.state_dict())
    model.update_teacher(0.9)
    new = model.state_dict()
    for name in old:
        student = name.replace("teacher_encoder", "encoder").replace(
            "teacher_projection", "projection_head"
        )
        expected = old[name] if student == name else 0.9 * old[name] + 0.1 * old[student]
        torch.testing.assert_close(new[name], expected)


# -- the temperature


def test_the_temperature_starts_where_asked_and_learns():
    model = tiny_model()
    torch.testing.assert_close(model.temperature(), torch.tensor(0.07))
    model.temperature().backward()
    assert model.theta.grad > 0


@pytest.mark.parametrize(("theta", "limit"), [(-40.0, 0.001), (40.0, 0.5)])
def test_the_temperature_cannot_leave_its_range(theta, limit):
    model = tiny_model()
    with torch.no_grad():
        model.theta.fill_(theta)
    torch.testing.assert_close(model.temperature(), torch.tensor(limit))


@pytest.mark.parametrize("temperature", [0.001, 0.5, -1.0, float("nan")])
def test_a_temperature_outside_its_range_is_an_input_error(temperature):
    with pytest.raises(InputError, match=r"^temperature is .* between 0\.001 and 0\.5$"):
        PretrainModel(TINY, PAIR, pool="cls", projection=6, temperature=temperature)


# -- real and reconstructed patches


def test_where_nothing_is_hidden_a_reconstruction_is_the_real_thing():
    (views, _), discriminator = tiny_batch(), Discriminator(16, 48, 16, 1, 2)
    nothing = random_mask((0, 0), torch.arange(3), 0, 16, 0.0, 0)
    output = tiny_model(("wli",))(views, {"wli": nothing})
    real, hidden = output.targets["wli"], output.hidden["wli"]
    fake = paste_patches(real, hidden, output.predictions["wli"])
    assert torch.equal(fake, real)
    assert torch.equal(discriminator(fake), discriminator(real))


def test_perfect_predictions_make_a_reconstruction_real():
    """Targets and predictions live in one space (the published code compares two)."""
    views, masks = tiny_batch()
    output = tiny_model()(views, masks)
    real, hidden = output.targets["nbi"], output.hidden["nbi"]
    assert torch.equal(paste_patches(real, hidden, take_rows(real, hidden)), real)


def test_a_reconstruction_holds_predictions_where_patches_were_hidden_and_true_values_elsewhere():
    views, masks = tiny_batch()
    output = tiny_model()(views, masks)
    real, (visible, hidden) = output.targets["wli"], masks["wli"]
    fake = paste_patches(real, hidden, output.predictions["wli"])
    assert torch.equal(take_rows(fake, hidden), output.predictions["wli"])
    assert torch.equal(take_rows(fake, visible), take_rows(real, visible))


def test_the_discriminators_gradient_reaches_the_encoder_through_a_reconstruction():
    model, (views, masks) = tiny_model(), tiny_batch()
    discriminator = Discriminator(16, 48, 16, 1, 2)
    output = model(views, masks)
    fake = paste_patches(output.targets["wli"], output.hidden["wli"], output.predictions["wli"])
    discriminator(fake).sum().backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad.norm() > 0  # the published code: none
    assert model.decoder.head.weight.grad.norm() > 0
