"""Files with timm's names: the weights that encoders get, and refusals in one sentence."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from mics_fast.common.errors import InputError
from mics_fast.models.initial_weights import load_initial_weights, resample_positions
from mics_fast.models.vit import VisionTransformer

WIDTH, DEPTH, PATCH = 16, 2, 4


def encoder(image=16, depth=DEPTH, width=WIDTH, patch=PATCH):
    return VisionTransformer(image, patch, width, depth, 2)


def timm_state(grid=4, class_position=True, width=WIDTH, depth=DEPTH, patch=PATCH):
    """Random weights under the names of timm's VisionTransformer, written down by hand."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    state = {
        "cls_token": random(1, 1, width),
        "pos_embed": random(1, grid * grid + class_position, width),
        "patch_embed.proj.weight": random(width, 3, patch, patch),
        "patch_embed.proj.bias": random(width),
        "norm.weight": random(width),
        "norm.bias": random(width),
        "head.weight": random(1000, width),
        "head.bias": random(1000),
    }
    for block in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            state[f"blocks.{block}.{name}.weight"] = random(rows, columns)
            state[f"blocks.{block}.{name}.bias"] = random(rows)
        for name in ("norm1", "norm2"):
            state[f"blocks.{block}.{name}.weight"] = random(width)
            state[f"blocks.{block}.{name}.bias"] = random(width)
    return state


@pytest.fixture
def load(tmp_path):
    """load(content, *encoders) -> the report on a file with this content."""

    def through_a_file(content, *encoders):
        file = tmp_path / "vit.pth"
        torch.save(content, file)
        return load_initial_weights(file, encoders)

    return through_a_file


def write_safetensors(file, state):
    """The format as it is documented: length of a JSON header, header, raw little-endian data."""
    header, data = {}, b""
    for name, tensor in state.items():
        raw = tensor.numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def assert_holds(encoder, state):
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_file_of_the_same_grid_gives_its_weights_bit_for_bit(load):
    state, own = timm_state(), encoder()
    report = load(state, own)
    assert_holds(own, state)
    assert "30 of 30 tensors" in report
    assert "resampled" not in report and report.endswith(
        "left out of the file: head.bias, head.weight"
    )


def test_every_encoder_gets_the_same_weights_and_keeps_whether_it_learns(load):
    first, second = encoder(), encoder().requires_grad_(False)
    load(timm_state(), first, second)
    assert_holds(second, first.state_dict())
    assert all(p.requires_grad for p in first.parameters())
    assert not any(p.requires_grad for p in second.parameters())


def test_a_safetensors_file_is_read(tmp_path):
    state, own = timm_state(), encoder()
    write_safetensors(tmp_path / "vit.safetensors", state)
    load_initial_weights(tmp_path / "vit.safetensors", [own])
    assert_holds(own, state)


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.backbone."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "model": s},
                                  lambda s: {"state_dict": s}])  # fmt: skip
def test_the_usual_wrappings_are_taken_off(load, prefix, wrap):
    state, own = timm_state(), encoder()
    load(wrap({f"{prefix}{name}": tensor for name, tensor in state.items()}), own)
    assert_holds(own, state)


def test_weights_in_half_precision_become_single_precision(load):
    state, own = timm_state(), encoder()
    load({name: tensor.bfloat16() for name, tensor in state.items()}, own)
    assert_holds(own, {name: tensor.bfloat16().float() for name, tensor in state.items()})


@pytest.mark.parametrize(("before", "after"), [(4, 6), (6, 4), (14, 24), (4, 7)])
def test_positions_are_resampled_as_pillow_resamples_a_picture(before, after):
    """Pillow's bicubic filter is antialiased, and another implementation of the same kernel."""
    grid = np.random.default_rng(0).standard_normal((before, before), dtype=np.float32)
    wanted = np.asarray(Image.fromarray(grid).resize((after, after), Image.Resampling.BICUBIC))
    found = resample_positions(torch.from_numpy(grid).reshape(1, -1, 1), after)
    np.testing.assert_allclose(found.reshape(after, after).numpy(), wanted, atol=1e-5)  # seen: 4e-6


def test_a_constant_field_of_positions_stays_constant():
    found = resample_positions(torch.full((1, 16, 3), 0.7), 9)
    torch.testing.assert_close(found, torch.full((1, 81, 3), 0.7))


def test_a_linear_field_of_positions_stays_linear_inside():
    """Cubic convolution reproduces straight lines, where it does not reach over the edge."""
    before, after = 8, 16
    row, column = torch.meshgrid(*[torch.arange(before) + 0.5] * 2, indexing="ij")
    field = torch.stack([row, column], -1).reshape(1, -1, 2)
    found = resample_positions(field, after).reshape(after, after, 2)
    centre = (torch.arange(after) + 0.5) * before / after
    inside = slice(4, -4)
    wanted = torch.stack(torch.meshgrid(centre, centre, indexing="ij"), -1)
    torch.testing.assert_close(found[inside, inside], wanted[inside, inside])


def test_another_grid_keeps_the_class_position_and_all_other_weights(load):
    state, own = timm_state(grid=3), encoder()
    report = load(state, own)
    assert "positions resampled from 3 x 3 to 4 x 4" in report
    assert torch.equal(own.pos_embed[:, :1], state["pos_embed"][:, :1])
    wanted = resample_positions(state["pos_embed"][:, 1:], 4)
    assert_holds(own, {**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], wanted], 1)})


def test_a_class_token_without_a_position_has_position_zero(load):
    state, own = timm_state(class_position=False), encoder()
    with torch.no_grad():
        own.pos_embed.fill_(5)
    assert "the class token has no position in the file" in load(state, own)
    assert torch.equal(own.pos_embed[:, 1:], state["pos_embed"])
    assert not own.pos_embed[:, 0].any()


def test_a_file_without_a_class_token_or_a_last_norm_leaves_the_encoder_s_own(load):
    state, own = timm_state(class_position=False), encoder()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    for name in ("cls_token", "norm.weight", "norm.bias"):
        del state[name]
    state["fc_norm.weight"] = torch.zeros(WIDTH)
    report = load(state, own)
    assert "not in the file, as initialised: cls_token, norm.bias, norm.weight" in report
    assert "left out of the file: fc_norm.weight, head.bias, head.weight" in report
    for name in ("cls_token", "norm.weight", "norm.bias"):
        assert torch.equal(own.state_dict()[name], before[name])
    assert torch.equal(own.pos_embed[:, :1], before["pos_embed"][:, :1])


def without(*names):
    return {name: tensor for name, tensor in timm_state().items() if name not in names}


ADDED = torch.zeros(1, 4, WIDTH)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            timm_state(width=32),
            r"vit\.pth holds an encoder of width 32, depth 2 .*width 16, depth 2",
        ),
        (timm_state(depth=3), "width 16, depth 3 and .* wants one of width 16, depth 2"),
        (timm_state(patch=8), "patches of 3 x 8 x 8, but model.size wants .* of 3 x 4 x 4"),
        ({"conv1.weight": torch.zeros(3)}, "holds none, wanted one vision transformer"),
        ({"model": {}}, "holds none, wanted one vision transformer"),
        ([1, 2], "holds none, wanted one vision transformer"),
        (
            {f"{p}.{n}": t for p in ("student", "teacher") for n, t in timm_state().items()},
            "holds 2 of them, below student., teacher., wanted one",
        ),
        ({**timm_state(), "reg_token": ADDED}, "holds reg_token, which .* do not have"),
        ({**timm_state(), "blocks.0.ls1.gamma": ADDED}, "holds blocks.0.ls1.gamma, which"),
        ({**timm_state(), "norm_pre.weight": ADDED}, "holds norm_pre.weight, which"),
        (without("pos_embed"), "lacks pos_embed$"),
        (without("blocks.1.attn.qkv.weight"), "lacks blocks.1.attn.qkv.weight$"),
        ({**timm_state(), "pos_embed": torch.zeros(1, 18, WIDTH)}, "has 18 positions, wanted"),
        ({**timm_state(), "pos_embed": torch.zeros(17, WIDTH)}, r"pos_embed is \(17, 16\), wanted"),
        (
            {**timm_state(), "blocks.0.mlp.fc1.bias": torch.zeros(3)},
            r"blocks.0.mlp.fc1.bias is \(3,\), wanted \(64,\)",
        ),
    ],
)
def test_another_network_is_refused_in_one_sentence(load, content, sentence):
    own = encoder()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(InputError, match=sentence) as error:
        load(content, own)
    assert "\n" not in str(error.value)
    assert_holds(own, before)


class Planted:
    """Code that unpickling would run."""

    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_code_in_a_file_is_never_run(load, capsys):
    with pytest.raises(InputError, match=r"vit\.pth cannot be read: it holds objects of .*print"):
        load({"model": Planted()}, encoder())
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("absent.pth", r"absent\.pth cannot be read: .*No such file"),
        ("absent.safetensors", r"absent\.safetensors cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        load_initial_weights(tmp_path / name, [encoder()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "vit.pth.tar", "weights"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_content_of_a_file_tells_its_format_and_not_its_name(tmp_path, name, legacy):
    state, own = timm_state(), encoder()
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    load_initial_weights(tmp_path / name, [own])
    assert_holds(own, state)
    other = encoder()
    write_safetensors(tmp_path / "vit.pth", state)
    load_initial_weights(tmp_path / "vit.pth", [other])
    assert_holds(other, state)


def test_of_several_networks_the_prefix_chooses_one(tmp_path):
    student, teacher, own = timm_state(), timm_state(), encoder()
    teacher = {name: tensor + 1 for name, tensor in teacher.items()}
    wrapped = {
        "student": {f"module.backbone.{name}": tensor for name, tensor in student.items()},
        "teacher": {f"backbone.{name}": tensor for name, tensor in teacher.items()},
        "epoch": 300,
    }
    file = tmp_path / "dino.pth"
    torch.save(wrapped, file)
    with pytest.raises(InputError, match=r"holds 2 of them, below student\.module\.backbone\., "):
        load_initial_weights(file, [own])
    with pytest.raises(InputError, match=r"below model\.init_prefix teacher\.head"):
        load_initial_weights(file, [own], "teacher.head")
    load_initial_weights(file, [own], "teacher.backbone")
    assert_holds(own, teacher)


def test_what_is_no_weights_file_is_one_sentence(tmp_path):
    file = tmp_path / "vit.pth"
    for content in (b"", b"\x89PNG\r\n", b"version https://git-lfs", b"\xff" * 8 + b"{"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is neither a safetensors file nor one that torch"):
            load_initial_weights(file, [encoder()])
    for content in (b"PK\x03\x04cut", b"\x80\x02cut", (3).to_bytes(8, "little") + b"{}}xxxx"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read") as error:
            load_initial_weights(file, [encoder()])
        assert "\n" not in str(error.value)


def test_a_file_that_holds_itself_ends_in_a_sentence(load):
    content = {}
    content["model"] = content
    with pytest.raises(InputError, match="holds none, wanted one vision transformer"):
        load(content, encoder())
