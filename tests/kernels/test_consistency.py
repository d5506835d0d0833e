"""The consistency loss, against soft-label cross-entropy on materialised logits."""

import pytest
import torch
import torch.nn.functional as F

from mics_kernels import consistency_loss, multimodal_consistency_loss

NAN = float("nan")
B, D, K, Q = 5, 6, 8, 7
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def unit(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture
def parts():
    """query, teacher, keys (more than queries), queue."""
    return unit(B, D, seed=0), unit(B, D, seed=1), unit(K, D, seed=2), unit(Q, D, seed=3)


def onehot(rows, keys):
    return F.one_hot(torch.arange(rows), keys).double()


def oracle(query, teacher, pool, temperature, alpha, allowed=None):
    """Cross-entropy with probability targets, by torch, over the keys each query may read."""
    logits, soft = query @ pool.T / temperature, teacher @ pool.T / temperature
    if allowed is not None:
        logits, soft = (part.where(allowed, torch.tensor(-1e6)) for part in (logits, soft))
    target = (1 - alpha) * onehot(len(query), len(pool)) + alpha * soft.softmax(1)
    by_hand = -(target * F.log_softmax(logits, 1)).sum(1)
    losses = F.cross_entropy(logits, target.detach(), reduction="none")
    torch.testing.assert_close(losses, by_hand)
    return losses


def loss_and_gradients(loss, *inputs):
    return loss.detach(), torch.autograd.grad(loss.sum(), inputs)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
def test_agrees_with_soft_label_cross_entropy(parts, alpha, temperature):
    query, teacher, keys, queue = parts
    query.requires_grad_()
    ours = consistency_loss(*parts, temperature=temperature, alpha=alpha, reduction="none")
    wanted = oracle(query, teacher, torch.cat([keys, queue]), temperature, alpha)
    torch.testing.assert_close(
        loss_and_gradients(ours, query), loss_and_gradients(wanted, query), **CLOSE
    )


def test_without_soft_targets_it_is_cross_entropy_on_the_diagonal(parts):
    query, _, keys, queue = parts
    logits = query @ torch.cat([keys, queue]).T / 0.1
    wanted = F.cross_entropy(logits, torch.arange(B))
    ours = consistency_loss(*parts, temperature=0.1, alpha=0.0)
    torch.testing.assert_close(ours, wanted, **CLOSE)


def test_a_query_that_equals_its_teacher_costs_its_entropy_at_alpha_one(parts):
    query, _, keys, queue = parts
    probability = (query @ torch.cat([keys, queue]).T / 0.1).softmax(1)
    wanted = torch.distributions.Categorical(probability).entropy()
    ours = consistency_loss(query, query, keys, queue, temperature=0.1, alpha=1.0, reduction="none")
    torch.testing.assert_close(ours, wanted, **CLOSE)


def test_a_learned_temperature_gets_the_gradient_of_the_hard_and_soft_logits(parts):
    query, teacher, keys, queue = parts
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    ours = consistency_loss(*parts, temperature=temperature)
    wanted_temperature = temperature.detach().clone().requires_grad_()
    pool = torch.cat([keys, queue])
    logits = query @ pool.T / wanted_temperature
    soft = (teacher @ pool.T / 0.1).softmax(1)
    target = 0.6 * onehot(B, K + Q) + 0.4 * soft
    wanted = F.cross_entropy(logits, target)
    torch.testing.assert_close(
        loss_and_gradients(ours, temperature),
        loss_and_gradients(wanted, wanted_temperature),
        **CLOSE,
    )


def test_gradients_pass_gradcheck(parts):
    query, *others = parts
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(query, temperature):  # alpha 0: a finite difference moves the soft target's T as well
        return consistency_loss(
            query, *others, temperature=temperature, alpha=0.0, reduction="none",
            key_ids=torch.tensor([0, 1, -1, 3, 1, 5, 6, 0]),
        )  # fmt: skip

    torch.autograd.gradcheck(loss, (query.requires_grad_(), temperature))
    torch.autograd.gradcheck(
        lambda query: consistency_loss(query, *others, temperature=0.3, alpha=0.7), query
    )


def test_keys_with_the_query_s_id_are_left_out_except_its_positive(parts):
    query, teacher, keys, queue = parts
    key_ids = torch.tensor([4, 7, 4, 9, 2, 4, 9, 3])
    queue_ids = torch.tensor([7, 7, 1, 4, -1, 9, 0])
    ids = torch.cat([key_ids, queue_ids])
    allowed = (ids >= 0) & ((key_ids[:B, None] != ids) | torch.eye(B, K + Q, dtype=torch.bool))
    ours = consistency_loss(
        *parts, temperature=0.1, key_ids=key_ids, queue_ids=queue_ids, reduction="none"
    )
    pool = torch.cat([keys, queue])
    torch.testing.assert_close(ours, oracle(query, teacher, pool, 0.1, 0.4, allowed), **CLOSE)


def test_a_queue_without_ids_is_read_whole(parts):
    distinct = torch.arange(K)
    with_ids = consistency_loss(*parts, temperature=0.1, key_ids=distinct)
    torch.testing.assert_close(with_ids, consistency_loss(*parts, temperature=0.1), **CLOSE)


def test_a_key_with_a_negative_id_is_never_read(parts):
    query, teacher, keys, queue = parts
    keys[6], queue[2] = NAN, NAN
    key_ids, queue_ids = torch.arange(K), torch.arange(100, 100 + Q)
    key_ids[6], queue_ids[2] = -1, -5
    ours = consistency_loss(
        query.requires_grad_(), teacher, keys, queue, temperature=0.1,
        key_ids=key_ids, queue_ids=queue_ids, reduction="none",
    )  # fmt: skip
    pool = torch.cat([keys[key_ids >= 0], queue[queue_ids >= 0]])
    wanted = oracle(query, teacher, pool, 0.1, 0.4)
    torch.testing.assert_close(
        loss_and_gradients(ours, query), loss_and_gradients(wanted, query), **CLOSE
    )


def test_a_query_whose_positive_is_not_read_does_not_count(parts):
    query, teacher, keys, queue = parts
    key_ids = torch.arange(K)
    key_ids[1] = -1
    query[1], teacher[1], keys[1] = NAN, NAN, NAN
    query.requires_grad_()
    arguments = {"temperature": torch.tensor(0.1, requires_grad=True), "key_ids": key_ids}
    rows = consistency_loss(query, teacher, keys, queue, reduction="none", **arguments)
    assert rows[1] == 0 and rows[[0, 2, 3, 4]].min() > 0
    mean = consistency_loss(query, teacher, keys, queue, **arguments)
    torch.testing.assert_close(mean, rows.sum() / 4)
    gradient, slope = torch.autograd.grad(mean, (query, arguments["temperature"]))
    assert torch.equal(gradient[1], torch.zeros(D, dtype=torch.float64))
    assert gradient.isfinite().all() and slope.isfinite()


def test_a_batch_without_any_key_costs_nothing(parts):
    query, teacher, keys, _ = parts
    inputs = (query.requires_grad_(), torch.tensor(0.1, requires_grad=True))
    nothing = torch.full((K,), -1)
    loss = consistency_loss(query, teacher, keys, temperature=inputs[1], key_ids=nothing)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, inputs):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("length", [0, 3, Q, torch.tensor(3)])
def test_only_the_filled_part_of_the_queue_is_read(parts, length):
    query, teacher, keys, queue = parts
    filled = queue[: int(length)].clone()
    queue[int(length) :] = NAN
    query.requires_grad_()
    ours = consistency_loss(query, teacher, keys, queue, temperature=0.1, queue_length=length)
    wanted = consistency_loss(query, teacher, torch.cat([keys, filled]), temperature=0.1)
    torch.testing.assert_close(
        loss_and_gradients(ours, query), loss_and_gradients(wanted, query), **CLOSE
    )


def test_the_order_of_the_queue_does_not_matter(parts):
    query, teacher, keys, queue = parts
    shuffled = queue[torch.tensor([3, 1, 6, 0, 2, 5, 4])]
    torch.testing.assert_close(
        consistency_loss(query, teacher, keys, shuffled, temperature=0.1),
        consistency_loss(query, teacher, keys, queue, temperature=0.1),
        **CLOSE,
    )


def test_identical_keys_cost_the_log_of_their_number():
    same = unit(1, D, seed=0).expand(4, D)
    loss = consistency_loss(same, same, same, same, temperature=0.07)
    assert loss.item() == pytest.approx(torch.tensor(8.0).log().item())


def test_reductions(parts):
    rows = consistency_loss(*parts, temperature=0.1, reduction="none")
    assert rows.shape == (B,)
    torch.testing.assert_close(consistency_loss(*parts, temperature=0.1), rows.mean())
    total = consistency_loss(*parts, temperature=0.1, reduction="sum")
    torch.testing.assert_close(total, rows.sum())


def test_no_queries_cost_nothing():
    query = torch.zeros(0, D, requires_grad=True)
    for keys in (torch.zeros(0, D), torch.ones(2, D)):
        loss = consistency_loss(query, query.detach(), keys, temperature=0.1)
        loss.backward()
        assert loss.item() == 0 and query.grad.shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_features_give_a_float32_loss_and_their_own_gradient(parts, dtype):
    query, *others = (part.to(dtype) for part in parts)
    exact = query.double().requires_grad_()
    query.requires_grad_()
    ours = consistency_loss(query, *others, temperature=0.07)
    wanted = consistency_loss(exact, *(part.double() for part in others), temperature=0.07)
    ours.backward()
    wanted.backward()
    assert ours.dtype == torch.float32 and query.grad.dtype == dtype
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=5e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(query.grad.double(), exact.grad, rtol=2 * eps, atol=5e-6)


def test_autocast_does_not_touch_the_loss(parts):
    narrow = [part.float() for part in parts]
    with torch.autocast("cpu", torch.bfloat16):
        inside = consistency_loss(*narrow, temperature=0.07)
    assert torch.equal(inside, consistency_loss(*narrow, temperature=0.07))


@pytest.mark.parametrize("name", ["teacher", "keys", "queue"])
def test_asking_a_gradient_of_what_gets_none_is_refused(parts, name):
    named = dict(zip(["query", "teacher", "keys", "queue"], parts, strict=True))
    named[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} requires a gradient"):
        consistency_loss(**named, temperature=0.1)
    with torch.no_grad():
        consistency_loss(**named, temperature=0.1)


# Many modalities


@pytest.fixture
def modalities():
    """Three modalities: features, teachers, keys, queues."""
    return [[unit(n, D, seed=10 * k + v) for v in range(3)] for k, n in enumerate((B, B, K, Q))]


def pairs():
    return [(a, b) for a in range(3) for b in range(3) if a != b]


def test_every_ordered_pair_of_modalities_counts_alike(modalities):
    features, teachers, keys, queues = modalities
    key_ids = torch.tensor([0, 1, 0, 3, -1, 5, 1, 7])
    queue_ids = [torch.arange(Q) + v for v in range(3)]
    lengths = [Q, 2, torch.tensor(4)]
    rows = [
        consistency_loss(
            features[a], teachers[a], keys[b], queues[b], temperature=0.1, alpha=0.3,
            queue_length=lengths[b], key_ids=key_ids, queue_ids=queue_ids[b], reduction="none",
        )
        for a, b in pairs()
    ]  # fmt: skip
    wanted = torch.stack(rows).sum(0)
    for reduction, value in [("none", wanted), ("sum", wanted.sum()), ("mean", wanted.sum() / 24)]:
        ours = multimodal_consistency_loss(
            features, teachers, queues, keys=keys, temperature=0.1, alpha=0.3,
            queue_lengths=lengths, key_ids=key_ids, queue_ids=queue_ids, reduction=reduction,
        )  # fmt: skip
        torch.testing.assert_close(ours, value, **CLOSE)


def test_a_modality_can_be_contrasted_with_itself(modalities):
    features, teachers, keys, queues = modalities
    given = [(0, 0), (2, 1), (2, 2)]
    wanted = [
        consistency_loss(
            features[a], teachers[a], keys[b], queues[b], temperature=0.1, alpha=0.3,
            reduction="none",
        )
        for a, b in given
    ]  # fmt: skip
    ours = multimodal_consistency_loss(
        features, teachers, queues, keys=keys, temperature=0.1, alpha=0.3, pairs=given,
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(ours, torch.stack(wanted).sum(0), **CLOSE)


def test_keys_are_the_teachers_unless_given(modalities):
    features, teachers, _, queues = modalities
    torch.testing.assert_close(
        multimodal_consistency_loss(features, teachers, queues, temperature=0.1),
        multimodal_consistency_loss(features, teachers, queues, keys=teachers, temperature=0.1),
    )


def test_an_absent_modality_is_neither_query_nor_key(modalities):
    features, teachers, _, _ = modalities
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).bool()
    wanted, count = 0, 0
    for a, b in pairs():
        both = present[:, a] & present[:, b]
        alone = present[:, b] & ~both  # keys of rows whose query is missing are still negatives
        pool = torch.cat([teachers[b][both], teachers[b][alone]])
        wanted = wanted + consistency_loss(
            features[a][both], teachers[a][both], pool, temperature=0.1, reduction="sum"
        )
        count += int(both.sum())
    for v in range(3):
        features[v][~present[:, v]] = NAN
        teachers[v][~present[:, v]] = NAN
        features[v].requires_grad_()
    ours = multimodal_consistency_loss(features, teachers, temperature=0.1, present=present)
    torch.testing.assert_close(ours, wanted / count, **CLOSE)
    for v, gradient in enumerate(torch.autograd.grad(ours, features)):
        counts = present[:, v] & (present.sum(1) > 1)
        assert gradient[counts].abs().min() > 0
        assert torch.equal(gradient[~counts], torch.zeros_like(gradient[~counts]))


def test_ranks_with_gathered_keys_add_up_to_one_rank(modalities):
    _, _, teachers, queues = modalities
    features = [unit(K, D, seed=50 + v) for v in range(3)]
    present = torch.rand(K, 3, generator=torch.Generator().manual_seed(0)) > 0.3
    whole = multimodal_consistency_loss(
        features, teachers, queues, temperature=0.1, present=present, reduction="sum"
    )
    parts = []
    for own in (slice(0, 4), slice(4, 8)):
        order = torch.cat([torch.arange(K)[own], torch.arange(K)[4 - own.start :][:4]])
        parts.append(
            multimodal_consistency_loss(
                [f[own] for f in features],
                [t[own] for t in teachers],
                queues,
                keys=[t[order] for t in teachers],
                temperature=0.1,
                present=present[order],
                reduction="sum",
            )
        )
    torch.testing.assert_close(sum(parts), whole, **CLOSE)


def test_keys_of_other_ranks_are_there_unless_their_flags_are_given(modalities):
    features, teachers, keys, _ = modalities
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).bool()
    gathered = torch.cat([present, torch.ones(K - B, 3, dtype=torch.bool)])
    own, all_flags = (
        multimodal_consistency_loss(
            features, teachers, keys=keys, temperature=0.1, present=flags, reduction="none"
        )
        for flags in (present, gathered)
    )
    assert torch.equal(own, all_flags)


def test_a_batch_without_any_pair_costs_nothing(modalities):
    features, teachers, _, _ = modalities
    present = torch.eye(3, dtype=torch.bool)[torch.tensor([0, 1, 2, 0, 1])]
    features = [f.requires_grad_() for f in features]
    loss = multimodal_consistency_loss(features, teachers, temperature=0.1, present=present)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, features):
        assert torch.equal(gradient, torch.zeros_like(gradient))
