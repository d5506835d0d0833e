"""The classifier of stage 2: one encoder per modality, a fusion encoder, one head per opinion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mics_fast.common.errors import InputError
from mics_fast.models.pooled import PooledEncoder, PooledFusion
from mics_fast.models.sizes import Size
from mics_fast.models.vit import (
    Block,
    Blocks,
    Pool,
    at_least_float32,
    initialise,
    pool_tokens,
    tokens_read,
)
from mics_fast.options import PooledFusionName

FUSION = "fusion"
# softplus(-4) = 0.018: an untrained head states hardly any evidence, for any number of opinions.
INITIAL_HEAD_BIAS = -4.0


@dataclass
class ClassifierOutput:
    """The opinions of a batch, in the order of ``Classifier.views``.

    float32, or float64 after ``.double()``.

    Args:
        logits: (B, V, C); undefined where an opinion is not present.
        present: (B, V) bool.
        fusion_feature: (B, width), the input of the fusion head; None with one modality.
    """

    logits: Tensor
    present: Tensor
    fusion_feature: Tensor | None


class FusionEncoder(nn.Module):
    """Transformer over the patch tokens of all modalities, with a class token of its own.

    Args:
        modalities: number M of modalities.
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads of a block.
        pool: "cls", or "mean" over the tokens that are present.
    """

    def __init__(self, modalities: int, width: int, depth: int, heads: int, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.modality_embed = nn.Parameter(torch.empty(modalities, 1, width))
        self.blocks = Blocks(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.modality_embed, std=0.02)
        initialise(self)

    def forward(self, patches: Tensor, present: Tensor) -> Tensor:
        """Fuse the present modalities; tokens of absent ones are never read.

        Args:
            patches: (B, M, N, width), finite everywhere.
            present: (B, M) bool.

        Returns:
            (B, width).
        """
        batch, _, count, _ = patches.shape
        cls_token = self.cls_token.expand(batch, -1, -1)
        tokens = torch.cat([cls_token, (patches + self.modality_embed).flatten(1, 2)], dim=1)
        readable = present.repeat_interleave(count, dim=1)
        # The class token is always readable, so the softmax of a row without modalities is defined.
        mask = torch.cat([readable.new_ones(batch, 1), readable], dim=1)[:, None, None]
        tokens = self.norm(self.blocks(tokens, mask, wanted=tokens_read(self.pool)))
        if self.pool == "cls":
            return tokens[:, 0]
        total = tokens[:, 1:].masked_fill(~readable.unsqueeze(-1), 0.0).sum(dim=1)
        return total / readable.sum(dim=1, keepdim=True).clamp(min=1)


class Classifier(nn.Module):
    """A classifier with one opinion per modality and, if there are several, one of their fusion.

    Args:
        size: of the networks.
        modalities: names of the modalities; not "fusion", and without a dot.
        num_classes: C.
        pool: input of a head: the class token, "cls", or the "mean" of the patch tokens.
        fusion_depth: blocks of the fusion encoder.
        pooled: read one feature per image, of a frozen encoder, and fuse those in this way; None:
            read images, and fuse their tokens.

    Raises:
        InputError: as ``check_modality_names``.
    """

    def __init__(
        self,
        size: Size,
        modalities: Sequence[str],
        num_classes: int,
        *,
        pool: Pool,
        fusion_depth: int,
        pooled: PooledFusionName | None = None,
    ) -> None:
        super().__init__()
        check_modality_names(modalities)
        self.modalities = tuple(modalities)
        self.pool: Pool = "cls" if pooled else pool
        self.encoders = nn.ModuleDict(
            {
                name: PooledEncoder(size.width, pool) if pooled else size.encoder()
                for name in self.modalities
            }
        )
        self.views = self.modalities
        self.fusion: FusionEncoder | PooledFusion | None = None
        count = len(self.modalities)
        if count >= 2:
            self.views += (FUSION,)
            self.fusion = (
                PooledFusion(count, size.width, pooled)
                if pooled
                else FusionEncoder(count, size.width, fusion_depth, size.heads, pool)
            )
        self.heads = nn.ModuleDict({view: _head(size.width, num_classes) for view in self.views})

    def forward(self, views: dict[str, Tensor], present: Tensor) -> ClassifierOutput:
        """Encode each modality, fuse them, and apply every head.

        Args:
            views: modality -> (B, 3, image, image), normalised, or (B, width) kept features;
                rows of an absent modality are never read and may even hold NaN.
            present: (B, M) bool, in the order of ``modalities``.
        """
        return self.speak(self.encode(views, present), present)

    def encode(self, views: dict[str, Tensor], present: Tensor) -> list[Tensor]:
        """Encode each modality to tokens, (B, 1 + N, width); arguments as ``forward``.

        With a single modality, only the tokens that its head reads are returned.
        """
        wanted = None if self.fusion else tokens_read(self.pool)
        return [
            self.encoders[name](_without_absent(views[name], present[:, index]), wanted=wanted)
            for index, name in enumerate(self.modalities)
        ]

    def speak(self, tokens: Sequence[Tensor], present: Tensor) -> ClassifierOutput:
        """Fuse the tokens of ``encode`` and apply every head.

        ``present`` may omit encoded modalities, to obtain an opinion without them.
        """
        features = {
            name: at_least_float32(pool_tokens(own, self.pool))
            for name, own in zip(self.modalities, tokens, strict=True)
        }
        if self.fusion is not None:
            first = 0 if isinstance(self.fusion, PooledFusion) else 1  # the class token
            patches = torch.stack([own[:, first:] for own in tokens], dim=1)
            features[FUSION] = at_least_float32(self.fusion(patches, present))
            several = present.sum(dim=1, keepdim=True) >= 2
            present = torch.cat([present, several], dim=1)
        with without_autocast(present.device):
            logits = [self.heads[view](features[view]) for view in self.views]
        return ClassifierOutput(torch.stack(logits, dim=1), present, features.get(FUSION))

    def fusion_logits(self, feature: Tensor) -> Tensor:
        """Apply the fusion head to a (shifted) feature: (B, width) -> (B, C) float32."""
        with without_autocast(feature.device):
            return self.heads[FUSION](at_least_float32(feature))

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Initialise every modality's encoder from one pre-trained encoder.

        Args:
            state: ``PretrainModel.encoder.state_dict()``.

        Raises:
            InputError: a parameter is missing, unexpected, or has another shape.
        """
        load_encoders(self.encoders.values(), state)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Compute heads as they are: near -4, bfloat16 has a resolution of only 0.03."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _head(width: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.constant_(head.bias, INITIAL_HEAD_BIAS)
    return head


def load_encoders(encoders: Iterable[nn.Module], state: Mapping[str, Tensor]) -> None:
    """Load encoders from a pre-trained one.

    Args:
        encoders: at least one, all of one architecture.
        state: ``PretrainModel.encoder.state_dict()``.

    Raises:
        InputError: a parameter is missing, left over, or has another shape.
    """
    for encoder in encoders:
        own = encoder.state_dict()
        for name in sorted(own.keys() | state.keys()):
            wanted = tuple(own[name].shape) if name in own else "absent"
            given = tuple(state[name].shape) if name in state else "absent"
            if given != wanted:
                raise InputError(
                    f"the pre-trained encoder does not fit the model: {name} is {given}, wanted "
                    f"{wanted}; are model.size, model.image and model.init the same?"
                )
        encoder.load_state_dict(state)


def check_modality_names(modalities: Sequence[str]) -> None:
    """Refuse modality names that cannot name an opinion.

    Raises:
        InputError: a name with a dot, or of another opinion or module attribute.
    """
    for name in modalities:
        if name in (FUSION, "fused") or "." in name or hasattr(nn.ModuleDict, name):
            raise InputError(f'"{name}" cannot be the name of a modality; rename its column')


def _without_absent(images: Tensor, present: Tensor) -> Tensor:
    # Masked at the input, so that a NaN reaches neither an activation nor (as 0 * NaN) a gradient.
    return torch.where(present.reshape(-1, *[1] * (images.ndim - 1)), images, 0.0)
