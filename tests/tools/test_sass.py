"""The check for overwritten registers, on handwritten machine code."""

from __future__ import annotations

import pytest

from mics_kernels.consistency.triton_kernels import tile_for
from tools.check_kernels.consistency import compiled_sweep
from tools.check_kernels.sass import disassembled, overwritten, products_from_registers

PRODUCT = "HGMMA.64x256x16.F32.BF16 R24, R184, gdesc[UR16].tnspB, R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def code(*lines: str) -> str:
    """Lines as nvdisasm prints them: instructions with their address, labels as they are."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * place:04x}*/                   {line} ;"
        for place, line in enumerate(lines)
    )


def test_a_register_may_be_written_once_its_product_was_waited_for() -> None:
    ours = code(f"{PRODUCT}, gsb0", WAIT, "MOV R184, R1")
    assert products_from_registers(ours) == 1
    assert overwritten(ours) == []


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R184, R1",
        "MOV R187, R1",
        "F2FP.BF16.F32.PACK_AB R185, R3, R2",
        "LDS.128 R184, [R5]",
        "LDS.64 R183, [R5]",
        "IMAD.WIDE.U32 R186, R1, 0x4, R2",
        "SHFL.BFLY PT, R184, R3, 0x2, 0x1f",
        "@!P1 MOV R184, R1",
        "LDSM.16.M88.4 R181, [R5]",
    ],
)
def test_a_register_that_is_written_before_is_reported(instruction: str) -> None:
    (found,) = overwritten(code(f"{PRODUCT}, gsb0", instruction, WAIT))
    assert found.split()[0] == instruction.removeprefix("@!P1 ").split()[0]


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R188, R184",
        "MOV R183, R1",
        "LDS.64 R182, [R184]",
        "STS.128 [R5], R184",
        "STG.E.128 desc[UR4][R184.64], R184",
        "ISETP.GE.AND P0, PT, R184, R3, PT",
        "R2UR UR4, R184",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "HGMMA.64x64x16.F32.BF16 R152, gdesc[UR20], R152",
    ],
)
def test_reading_a_register_or_writing_others_is_no_fault(instruction: str) -> None:
    assert overwritten(code(f"{PRODUCT}, gsb0", instruction, WAIT)) == []


def test_a_product_at_the_end_of_a_pass_is_open_at_the_beginning_of_the_next() -> None:
    body = [".L_x_1:", "MOV R184, R1", f"{PRODUCT}, gsb0", "@P0 BRA `(.L_x_1)"]
    assert overwritten(code(*body, WAIT)) == ["MOV R184, R1"]
    body[1:1] = [WAIT]
    assert overwritten(code(*body, WAIT)) == []


def test_a_wait_may_leave_the_latest_group_of_products_open() -> None:
    other = PRODUCT.replace("R184", "R188")
    both = [f"{PRODUCT}, gsb0", f"{other}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    assert overwritten(code(*both, "MOV R184, R1")) == []
    assert overwritten(code(*both, "MOV R188, R1")) == ["MOV R188, R1"]
    # Products before the one that names the barrier are of its group.
    assert overwritten(code(PRODUCT, *both[1:], "MOV R184, R1")) == ["MOV R184, R1"]


def test_the_sweep_multiplies_from_registers_and_overwrites_none() -> None:
    """The compiled kernel itself, so that the check is of what is there."""
    tile = tile_for(90, 64, 256, 2, False, False)
    ours = disassembled(compiled_sweep(90, 256, "half", False, tile, True))
    assert products_from_registers(ours) > 0
    assert overwritten(ours) == []
