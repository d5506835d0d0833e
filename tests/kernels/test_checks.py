"""Refusals: one sentence with the argument, what was given, what is wanted."""

import pytest
import torch

import mics_kernels as mk
from mics_kernels import checks

F32 = torch.float32
EVIDENCE = torch.ones(4, 2, 3)
LABELS = torch.tensor([0, 1, 2, -100])
UNIT = torch.eye(4)
FEATURES = torch.zeros(4, 5)
CLASSES = torch.tensor([0, 1, -1, 0])
VARIANCE = torch.ones(2, 5)
SEED = torch.tensor([1, 2])


def fuse(evidence=EVIDENCE, **options):
    return mk.fuse_evidence(evidence, **options)


def loss(evidence=EVIDENCE, target=LABELS, kl_weight=0.1, **options):
    return mk.evidential_loss(evidence, target, kl_weight=kl_weight, **options)


def fusion_loss(logits=EVIDENCE, target=LABELS, kl_weight=0.1, **options):
    return mk.evidential_fusion_loss(logits, target, kl_weight=kl_weight, **options)


def consistency(query=UNIT, teacher=UNIT, keys=UNIT, queue=None, temperature=0.1, **options):
    return mk.consistency_loss(query, teacher, keys, queue, temperature=temperature, **options)


def multimodal(features=(UNIT, UNIT), teachers=(UNIT, UNIT), queues=None, **options):
    return mk.multimodal_consistency_loss(features, teachers, queues, temperature=0.1, **options)


def moments(features=FEATURES, target=CLASSES, num_classes=2, **options):
    return mk.class_moments(features, target, num_classes, **options)


def shift(features=FEATURES, target=CLASSES, variance=VARIANCE, strength=1.0, seed=SEED, **options):
    return mk.shift_features(features, target, variance, strength=strength, seed=seed, **options)


def needs_gradient(tensor):
    return tensor.clone().requires_grad_()


REFUSED = [
    # evidential
    (fuse, {"evidence": [1.0]}, TypeError, "evidence must be a torch.Tensor, got list"),
    (fuse, {"evidence": torch.ones(4, 3)}, ValueError,
     "evidence must have shape (B, V, C), got (4, 3)"),
    (fuse, {"evidence": EVIDENCE.long()}, TypeError,
     "evidence must be float32, bfloat16, float16 or float64, got int64"),
    (fuse, {"evidence": -EVIDENCE}, ValueError, "evidence must be >= 0, got -1.0"),
    (fuse, {"evidence": torch.ones(4, 0, 3)}, ValueError,
     "evidence must hold at least one view, got shape (4, 0, 3)"),
    (fuse, {"evidence": torch.ones(4, 2, 1)}, ValueError,
     "evidence must hold at least two classes, got 1"),
    (fuse, {"present": torch.ones(4, 3).bool()}, ValueError,
     "present must have shape (4, 2), got (4, 3)"),
    (fuse, {"present": torch.ones(4, 2)}, TypeError, "present must be bool, got float32"),
    (fuse, {"present": torch.ones(4, 2, device="meta").bool()}, ValueError,
     "present must be on cpu like the other tensors, got meta"),
    (loss, {"evidence": torch.ones(3)}, ValueError,
     "evidence must have shape (B, V, C), got (3,)"),
    (loss, {"evidence": -torch.ones(4, 3)}, ValueError, "evidence must be >= 0, got -1.0"),
    (loss, {"evidence": torch.ones(4, 3), "present": torch.ones(4, 1).bool()}, ValueError,
     "present needs evidence of shape (B, V, C), got one opinion per row"),
    (loss, {"target": LABELS.int()}, TypeError, "target must be int64, got int32"),
    (loss, {"target": LABELS[:3]}, ValueError, "target must have shape (4,), got (3,)"),
    (loss, {"target": torch.tensor([0, 3, 1, 1])}, ValueError,
     "target must hold labels in [0, 3), or -100 for a row to skip, got 3 in row 1"),
    (loss, {"target": torch.ones(4, 2)}, ValueError, "target must have shape (4, 3), got (4, 2)"),
    (loss, {"target": torch.full((4, 3), 1.5)}, ValueError, "target must be in [0, 1], got 1.5"),
    (loss, {"target": needs_gradient(torch.ones(4, 3))}, ValueError,
     "target requires a gradient, but this operator gives none to it: pass target.detach()"),
    (loss, {"kl_weight": -0.1}, ValueError, "kl_weight must be >= 0, got -0.1"),
    (loss, {"kl_weight": float("nan")}, ValueError, "kl_weight must be >= 0, got nan"),
    (loss, {"kl_weight": 2**70}, ValueError, f"kl_weight must fit into 64 bits, got {2**70}"),
    (consistency, {"temperature": 2**70}, ValueError,
     f"temperature must fit into 64 bits, got {2**70}"),
    (loss, {"kl_weight": "1"}, TypeError, "kl_weight must be a number, got str"),
    (loss, {"kl_weight": torch.tensor(-1.0)}, ValueError, "kl_weight must be >= 0, got -1.0"),
    (loss, {"kl_weight": torch.ones(1)}, ValueError,
     "kl_weight must have shape (), got (1,)"),
    (loss, {"kl_weight": needs_gradient(torch.tensor(1.0))}, ValueError,
     "kl_weight requires a gradient, but this operator gives none to it: "
     "pass kl_weight.detach()"),
    (loss, {"weight": torch.ones(3)}, ValueError, "weight must have shape (4,), got (3,)"),
    (loss, {"weight": needs_gradient(torch.ones(4))}, ValueError,
     "weight requires a gradient, but this operator gives none to it: pass weight.detach()"),
    (loss, {"reduction": "avg"}, ValueError,
     "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    (fusion_loss, {"logits": torch.ones(4, 3)}, ValueError,
     "logits must have shape (B, V, C), got (4, 3)"),
    (fusion_loss, {"activation": "gelu"}, ValueError,
     "activation must be 'softplus', 'exp' or 'relu', got 'gelu'"),
    (fusion_loss, {"target": LABELS - 1}, ValueError,
     "target must hold labels in [0, 3), or -100 for a row to skip, got -1 in row 0"),
    # consistency
    (consistency, {"query": UNIT[0]}, ValueError, "query must have shape (B, D), got (4,)"),
    (consistency, {"teacher": UNIT[:, :3]}, ValueError,
     "teacher must have shape (4, 4), got (4, 3)"),
    (consistency, {"keys": UNIT[:3]}, ValueError,
     "keys must start with one row per query, 4, got 3 rows"),
    (consistency, {"queue": UNIT[:, :3]}, ValueError, "queue must have shape (Q, 4), got (4, 3)"),
    (consistency, {"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
    (consistency, {"temperature": torch.tensor(-1.0)}, ValueError,
     "temperature must be > 0, got -1.0"),
    (consistency, {"temperature": torch.ones(1)}, ValueError,
     "temperature must have shape (), got (1,)"),
    (consistency, {"alpha": 1.5}, ValueError, "alpha must be in [0, 1], got 1.5"),
    (consistency, {"queue_length": 3}, ValueError, "queue_length needs a queue, got None"),
    (consistency, {"queue": UNIT, "queue_length": 5}, ValueError,
     "queue_length must be in [0, 4], got 5"),
    (consistency, {"queue": UNIT, "queue_length": 2.0}, TypeError,
     "queue_length must be an int, got float"),
    (consistency, {"queue": UNIT, "queue_length": torch.tensor(-1)}, ValueError,
     "queue_length must be in [0, 4], got -1"),
    (consistency, {"key_ids": torch.arange(3)}, ValueError,
     "key_ids must have shape (4,), got (3,)"),
    (consistency, {"queue": UNIT, "queue_ids": torch.arange(4)}, ValueError,
     "queue_ids needs key_ids, got None"),
    (consistency, {"queue_ids": torch.arange(4)}, ValueError, "queue_ids needs a queue, got None"),
    (multimodal, {"features": UNIT}, TypeError,
     "features must be a list with one entry per modality, got Tensor"),
    (multimodal, {"features": [UNIT], "teachers": [UNIT]}, ValueError,
     "features must hold at least two modalities, got 1"),
    (multimodal, {"teachers": [UNIT]}, ValueError,
     "teachers must have one entry per modality like features, 2, got 1"),
    (multimodal, {"features": [UNIT, UNIT.double()]}, TypeError,
     "features[1] must be float32, got float64"),
    (multimodal, {"teachers": [UNIT, needs_gradient(UNIT)]}, ValueError,
     "teachers[1] requires a gradient, but this operator gives none to it: "
     "pass teachers[1].detach()"),
    (multimodal, {"keys": [UNIT, UNIT[:3]]}, ValueError,
     "keys[1] must have shape (4, 4), got (3, 4)"),
    (multimodal, {"queues": [UNIT, UNIT], "queue_lengths": [1, 9]}, ValueError,
     "queue_lengths[1] must be in [0, 4], got 9"),
    (multimodal, {"queues": [UNIT] * 2, "queue_ids": [torch.arange(4)] * 2}, ValueError,
     "queue_ids[0] needs key_ids, got None"),
    (multimodal, {"present": torch.ones(3, 2).bool()}, ValueError,
     "present must have shape (4, 2), got (3, 2)"),
    (multimodal, {"pairs": [(0, 2)]}, ValueError,
     "pairs must be a list of tuples (a, b) of modalities from 0 to 1, got [(0, 2)]"),
    (multimodal, {"pairs": []}, ValueError,
     "pairs must be a list of tuples (a, b) of modalities from 0 to 1, got []"),
    # shift
    (moments, {"features": torch.zeros(4)}, ValueError,
     "features must have shape (B, D), got (4,)"),
    (moments, {"num_classes": 0}, ValueError, "num_classes must be >= 1, got 0"),
    (moments, {"target": CLASSES + 1}, ValueError,
     "target must hold labels in [0, 2), or -1 for a row to skip, got 2 in row 1"),
    (moments, {"weight": -torch.ones(4)}, ValueError, "weight must be >= 0, got -1.0"),
    (shift, {"variance": torch.ones(2, 4)}, ValueError,
     "variance must have shape (C, 5), got (2, 4)"),
    (shift, {"variance": -VARIANCE}, ValueError, "variance must be >= 0, got -1.0"),
    (shift, {"variance": needs_gradient(VARIANCE)}, ValueError,
     "variance requires a gradient, but this operator gives none to it: pass variance.detach()"),
    (shift, {"strength": -1.0}, ValueError, "strength must be >= 0, got -1.0"),
    (shift, {"strength": torch.ones(2)}, ValueError, "strength must have shape (4,), got (2,)"),
    (shift, {"seed": torch.tensor([1])}, ValueError, "seed must have shape (2,), got (1,)"),
    (shift, {"seed": SEED.int()}, TypeError, "seed must be int64, got int32"),
    (shift, {"row_ids": torch.arange(3)}, ValueError, "row_ids must have shape (4,), got (3,)"),
    (mk.ClassStatistics, {"num_classes": 2, "dim": 3, "momentum": 0.0}, ValueError,
     "momentum must be > 0 and < 1, got 0.0"),
    (mk.ClassStatistics, {"num_classes": 2, "dim": 3, "momentum": 1.0}, ValueError,
     "momentum must be > 0 and < 1, got 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "arguments", "error", "sentence"),
    REFUSED,
    ids=[
        f"{call.__name__}-{'-'.join(arguments)}-{i}"
        for i, (call, arguments, *_) in enumerate(REFUSED)
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(call, arguments, error, sentence):
    with pytest.raises(error) as caught:
        call(**arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("call", [fuse, loss, fusion_loss, consistency, multimodal, moments, shift])
def test_the_arguments_these_cases_start_from_are_accepted(call):
    call()


def test_merging_moments_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"b.mean must have shape \(2, 5\), got \(3, 5\)"):
        mk.merge_moments(moments(), moments(num_classes=3))


def test_values_nobody_reads_are_not_checked():
    evidence = EVIDENCE.clone()
    evidence[1, 0] = -1.0
    present = torch.ones(4, 2, dtype=torch.bool)
    present[1, 0] = False
    fuse(evidence, present=present)


def test_values_on_a_gpu_are_looked_at_only_when_asked(monkeypatch):
    elsewhere = torch.zeros(1, device="meta")  # stands for any device that is not the CPU
    monkeypatch.setattr(checks, "is_plain", lambda value: True)
    monkeypatch.delenv("MICS_KERNELS_CHECK", raising=False)
    assert checks.looks_at_values(torch.zeros(1))
    assert not checks.looks_at_values(elsewhere)
    monkeypatch.setenv("MICS_KERNELS_CHECK", "1")
    assert checks.looks_at_values(elsewhere)


@pytest.fixture
def unchecked(monkeypatch):
    """Without MICS_KERNELS_CHECK, values on a GPU are not checked."""
    monkeypatch.setattr(checks, "looks_at_values", lambda value: False)


def test_an_unchecked_bad_label_reads_nothing_out_of_bounds(unchecked):
    labels = torch.tensor([7, -3, 1, 0])
    assert loss(target=labels, reduction="none").isfinite().all()
    counts = moments(target=torch.tensor([7, -3, 1, 0])).count
    assert counts.tolist() == [1, 1]
    moved = shift(target=torch.tensor([7, -3, 1, 0]))
    assert torch.equal(moved[:2], FEATURES[:2]) and (moved[2:] != 0).all()


def test_an_unchecked_queue_length_reads_no_more_than_the_queue(unchecked):
    longer = consistency(queue=UNIT, queue_length=torch.tensor(99))
    assert torch.equal(longer, consistency(queue=UNIT))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused_where_the_shape_is_open():
    nested = torch.nested.nested_tensor([EVIDENCE, EVIDENCE])
    with pytest.raises(TypeError, match="evidence must be a dense tensor, got layout nested"):
        mk.opinion(nested)
    with pytest.raises(TypeError, match="present must be a dense tensor, got layout nested"):
        multimodal(present=nested)
