"""A pretended GPU: tensors that say "cuda" and hold no data.

Operators work out shapes, dtypes and devices alone (``FakeTensorMode``), Triton's kernels are asked
for but not launched, and ``Watch`` refuses what would make the host wait for the GPU or leave a
tensor on the wrong one of the two. Nothing is said of values, nor of what DALI does.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mics_fast.data import batch as batches
from mics_fast.data import cache, views
from mics_kernels import registration, triton_common

GPU = torch.device("cuda", 0)
STREAM = object()
PRETENCE = FakeTensorMode(allow_non_fake_inputs=True)
COPIES = ("_to_copy", "copy_")
FUSED = (torch.ops.aten._fused_adamw_.tensor_lr, torch.ops.aten._fused_adam_.tensor_lr)

# Autograd asks each device for its streams, which torch has none of where there is no GPU.
STREAMS = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
#include <new>
using namespace c10;
static const Device gpu(DeviceType::CUDA, 0);
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return gpu; }
  Device getDevice() const override { return gpu; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, gpu); }
  void record(void **, const Stream &, DeviceIndex, EventFlag) const override {}
  void block(void *, const Stream &) const override {}
};
struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
extern "C" void pretend(bool on) {
  static const Guard guard;
  static const impl::DeviceGuardImplInterface *guard_before = nullptr;
  static void *hooks_before = nullptr;
  auto &slot = impl::device_guard_impl_registry[static_cast<int>(DeviceType::CUDA)];
  void *hooks = const_cast<at::CUDAHooksInterface *>(&at::detail::getCUDAHooks());
  if (on) {
    guard_before = slot.exchange(&guard);
    std::memcpy(&hooks_before, hooks, sizeof hooks_before);
    new (hooks) Hooks;  // no hooks have state, only a table of functions
  } else {
    slot.store(guard_before);
    std::memcpy(hooks, &hooks_before, sizeof hooks_before);
  }
}
"""


class Stray(AssertionError):
    """A tensor on the wrong device, or one that the host would wait for."""


class Watch(TorchDispatchMode):
    """Allows only operations that do not make the host wait for the GPU.

    Args:
        reads: results may be read back.
    """

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FUSED:  # in place, and without a pretended form
            assert kwargs["lr"].dtype == torch.float32, "what the kernel reads"
            result = None
        else:
            result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            self.check(func, args, kwargs, result)
        return result

    def check(self, func, args, kwargs, result):
        name = func.overloadpacket.__name__
        if name == "fill_" and not args[1].dim():
            return  # of one number, as in x[0] = 1: it goes with the launch
        if name not in COPIES:
            raise Stray(f"{func} has tensors on the host and on the GPU")
        source = args[1] if name == "copy_" else args[0]
        if source.device.type == "cuda":
            if not self.reads:
                raise Stray(f"{func} reads the GPU")
            return
        blocking = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        if blocking or not getattr(source, "pinned", False):
            raise Stray(f"{func} of a host tensor {tuple(source.shape)} waits for the GPU")


launched: set[str] = set()


def launch(kernel, *arguments):
    """Replaces a launch: checks that a kernel gets contiguous tensors of the GPU."""
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, Tensor):
            assert tensor.device.type == "cuda" and tensor.is_contiguous(), kernel.__name__
    launched.add(kernel.__name__)


def compiled_for(kernel, grid, arguments, constants):
    """``triton_common.compiled_for``, of a kernel for any grid."""
    return defaultdict(lambda: partial(launch, kernel)), ()


def pin(tensor):
    tensor.pinned = True
    return tensor


def move(module, device):
    """``Module.to`` from a CPU to a pretended GPU."""
    with PRETENCE:
        for own in module.modules():
            for name, value in own._parameters.items():
                moved = torch.nn.Parameter(value.detach().to(device), value.requires_grad)
                own._parameters[name] = moved
            for name, value in own._buffers.items():
                own._buffers[name] = None if value is None else value.to(device)
    return module


@contextmanager
def pretended_gpu(folder):
    """Within this context there is one; what has to be compiled for it goes to the folder."""
    patch = pytest.MonkeyPatch()
    streams = None
    if not torch.cuda.is_available():
        streams = load_streams(folder)
        streams.pretend(True)
        patch.setattr(torch.cuda, "_exchange_device", lambda index: index)
        patch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: index)
    chip = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(triton_common, "compiled_for", compiled_for)
    patch.setattr(Tensor, "pin_memory", pin)
    patch.setattr(torch.nn.Module, "to", move)
    patch.setattr(torch.cuda, "current_stream", lambda device: STREAM)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    # The operators would hand tensors without storage to torch's dispatcher, not to a launch.
    patch.setattr(registration, "is_intercepted", lambda: False)
    patch.setattr(registration, "is_plain", lambda tensor: True)
    for module in (batches, cache):
        patch.setattr(module, "to_torch", lambda output, device: output.to_torch(device))
    try:
        with torch.autograd.set_multithreading_enabled(False), PRETENCE:
            yield GPU
    finally:
        views._levels.cache_clear()
        patch.undo()
        if streams is not None:
            streams.pretend(False)


def load_streams(folder):
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which builds what torch asks of a GPU's streams")
    torch_folder = torch.__path__[0]
    source, library = folder / "streams.cpp", folder / "streams.so"
    source.write_text(STREAMS)
    command = [
        "g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(source),
        f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))
