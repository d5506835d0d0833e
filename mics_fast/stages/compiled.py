"""What of a stage ``torch.compile`` gets to see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mics_fast.models.discriminator import L2Block
from mics_fast.models.vit import Block
from mics_fast.options import CompileScope


def compile_parts(stage: nn.Module, scope: CompileScope, methods: Iterable[str]) -> None:
    """Compile a stage in place; its state keeps its names. One stage at a time is compiled.

    Args:
        stage: its modules, or its methods, are compiled when they first run.
        scope: "blocks": each transformer block, one graph for all of a kind and shape; "step": the
            methods, one graph each.
        methods: of the stage, without a side effect; what changes from step to step they must take
            as arguments: tensors, as a number would be compiled in.
    """
    # What other stages of this process have compiled counts towards the variants that torch keeps
    # of one function, eight: beyond them it gives up.
    torch.compiler.reset()
    if scope == "blocks":
        for module in stage.modules():
            if isinstance(module, Block | L2Block):
                module.compile()
        return
    for name in methods:
        setattr(stage, name, torch.compile(getattr(stage, name), fullgraph=True))
