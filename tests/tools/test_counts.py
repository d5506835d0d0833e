"""Counts in the code of a compiled kernel, on handwritten code."""

from __future__ import annotations

from tools.check_kernels import counts

CODE = """
  tt.func public @kernel(%x: !tt.ptr<bf16>) {
    %seed = tt.load %0 : !tt.ptr<i64> loc(#loc1)
    %rows = tt.load %1, %mask, %zero : tensor<16x256x!tt.ptr<bf16>> loc(#loc2)
    %sum:2 = scf.for %tile = %a to %b step %c iter_args(%p = %q) -> (tensor<16xf32>)  : i32 {
      %keys = tt.load %2, %mask, %zero : tensor<64x256x!tt.ptr<bf16>> loc(#loc3)
      %s = tt.dot %rows, %t, %0 : tensor<16x256xbf16> * tensor<256x64xbf16> -> tensor<16x64xf32>
      scf.for %j = %a to %b step %c  : i32 {
        %m = arith.mulf %s, %s : tensor<16x64xf32> loc(#loc4)
      } loc(#loc5)
      %e = math.exp2 %s : tensor<16x64xf32> loc(#loc6)
    } loc(#loc7)
    tt.store %3, %sum, %mask : tensor<16x256x!tt.ptr<f32>> loc(#loc8)
  }
"""


def test_bytes_and_flops_are_counted_by_loop() -> None:
    found = list(counts.operations(CODE))
    assert counts.total(found, "load") == 8 + 16 * 256 * 2 + 64 * 256 * 2
    assert counts.total(found, "load", rank=2, depth=1) == 64 * 256 * 2
    assert counts.total(found, "dot", depth=1) == 2 * 16 * 64 * 256
    assert counts.total(found, "float", depth=2) == 16 * 64
    assert counts.total(found, "float", depth=1) == 16 * 64
    assert counts.total(found, "store", depth=0) == 16 * 256 * 4


def test_loads_and_stores_of_sixteen_bytes_are_distinguished_from_narrow_ones() -> None:
    narrow = "ld.global.v2.b32 {%r1, %r2}, [ %rd1 ];\nld.global.b64 %rd2, [ %rd1 ];"
    narrow += "\ncp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4;"
    assert counts.wide(narrow, "ld") == 0
    wide = "ld.global.L1::evict_first.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 ];"
    wide += "\ncp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
    assert counts.wide(wide, "ld") == 2
    assert counts.wide("st.global.v4.b32 [ %rd1 ], {%r1, %r2, %r3, %r4};", "st") == 1
