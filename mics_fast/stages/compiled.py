"""Compilation of a stage: the parts that ``torch.compile`` compiles."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mics_fast.models.discriminator import L2Block
from mics_fast.models.vit import Block
from mics_fast.options import CompileScope


def compile_parts(stage: nn.Module, scope: CompileScope, methods: Iterable[str]) -> None:
    """Compile a stage in place without renaming its state. One stage at a time can be compiled.

    Args:
        stage: its modules or methods are compiled on their first run.
        scope: "blocks": each transformer block, one graph per kind and shape; "step": each of the
            methods, one graph each.
        methods: of the stage, without side effects. Values that change per step must be tensor
            arguments, because a Python number would become a constant of the graph.
    """
    # torch keeps at most eight variants of a function, and falls back to eager beyond; variants of
    # earlier stages count, too.
    torch.compiler.reset()
    if scope == "blocks":
        for module in stage.modules():
            if isinstance(module, Block | L2Block):
                module.compile()
        return
    for name in methods:
        setattr(stage, name, torch.compile(getattr(stage, name), fullgraph=True))
