"""A CUDA device that is not there: run a PyTorch program on it, and see what it would do to a real one.

    python tests/gpu/simulated.py SCRIPT [ARGUMENTS...]      the script, with `torch.cuda` saying that there is an H100
    python tests/gpu/simulated.py -m MODULE [ARGUMENTS...]   a module, `-m pytest -n 0 tests/...` for one
    python tests/gpu/simulated.py --self-test                what it refuses and counts, on itself

Options stand before the script. `--within package.module:Class.method` books only what happens inside of that function and
divides by its calls; `--json FILE` keeps the ledger; `--data meta` has shapes and no values, so that a 7B model costs nothing.
In a program of your own: `from tests.gpu import simulated; simulated.enable(package=".")` before torch is used, and read
`simulated.LEDGER`.

How: a `SimTensor` says `cuda:0`, has the CUDA, AutogradCUDA and AutocastCUDA dispatch keys, and keeps its data in `inner`, an
ordinary tensor of the host. A dispatch mode sees every operator: it refuses what CUDA would refuse, computes on `inner`, and
books transfers, synchronisations, launches, bytes, FLOPs and live memory in `LEDGER`, by the program's own line. Autograd and
autocast above it are the real ones; backward runs in the device's thread. It needs a CPU build of torch and g++.

What it cannot say: time; the device's numerics; races of streams; what a compiler makes of a function (`torch.compile` runs it
as it is and books one launch); errors inside of kernels, out of memory. An operator is one launch here; some are more.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

_BACKEND = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <map>
#include <mutex>
using namespace c10;
static std::mutex mutex;
static std::map<const char*, size_t> pinned;
struct Pinned final : Allocator {
  DataPtr allocate(size_t bytes) override {
    auto data = static_cast<char*>(alloc_cpu(bytes ? bytes : 1));
    std::lock_guard<std::mutex> guard(mutex);
    pinned[data] = bytes;
    return {data, data, &release, Device(DeviceType::CPU)};
  }
  static void release(void* data) {
    { std::lock_guard<std::mutex> guard(mutex); pinned.erase(static_cast<char*>(data)); }
    free_cpu(data);
  }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> guard(mutex);
    auto next = pinned.upper_bound(static_cast<const char*>(data));
    return next != pinned.begin() && static_cast<const char*>(data) < (--next)->first + next->second;
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
static Pinned host;
static thread_local DeviceIndex now = 0;
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, now); }
  Device exchangeDevice(Device d) const override { auto old = now; now = d.index(); return Device(DeviceType::CUDA, old); }
  void setDevice(Device d) const override { now = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { now = d.index(); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  DeviceIndex deviceCount() const noexcept override { return 8; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
static Guard guard;
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
namespace at {
struct SimHooks final : CUDAHooksInterface {
  SimHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 8; }
  DeviceIndex getCurrentDevice() const override { return now; }
  DeviceIndex current_device() const override { return now; }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &host; }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", SimHooks);
}
"""


def _load_backend() -> None:
    """A CPU build knows no CUDA device: `to` asks for a guard, the autograd engine for an accelerator. Before torch asks."""
    root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    digest = hashlib.sha256((_BACKEND + str(root)).encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"simulated-cuda-{os.getuid()}-{digest}.so"
    if not library.is_file():
        source, scratch = library.with_suffix(f".{os.getpid()}.cpp"), library.with_suffix(f".{os.getpid()}")
        source.write_text(_BACKEND)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(source), f"-L{root}/lib"]
        subprocess.run(["g++", *options, "-ltorch_cpu", "-lc10", "-o", str(scratch)], check=True)
        source.unlink()
        scratch.rename(library)
    for file in (root / "lib/libtorch_global_deps.so", root / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


_load_backend()
import torch  # noqa: E402
import torch._dynamo  # noqa: E402 - before torch.cuda says that it is there
import torchgen  # noqa: E402
import yaml  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

aten = torch.ops.aten
STATE = SimpleNamespace(data="cpu", package="", current=0, initialized=False, fused=0)
TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices, cuda:{} and {}! (aten::{})"
INDEX_DEVICE = "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
NUMPY = "can't convert {} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."


class Ledger:
    """What happened, by the innermost line of the program under test.

    Attributes:
        syncs: (kind, line) to [count, bytes]; the host waits for the device where the kind does not end with `non_blocking`.
        work: (line, operator) to [launches, bytes read and written, FLOPs of matrix products].
        live, peak: bytes of tensors on the device.
        calls: of the function that `within` watches.
        booking: whether syncs and work are booked now.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.booking = True
        self.clear()

    def clear(self) -> None:
        """Forget syncs and work; memory stays."""
        self.calls = 0
        self.syncs: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self.work: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0])

    def sync(self, kind: str, nbytes: int = 0) -> None:
        """Book a synchronisation or a transfer."""
        if self.booking:
            entry = self.syncs[kind, line()]
            entry[0] += 1
            entry[1] += nbytes

    def launch(self, name: str, launches: int, traffic: float, flops: float = 0) -> None:
        """Book work on the device."""
        if self.booking:
            entry = self.work[line(), name]
            for position, value in enumerate((launches, traffic, flops)):
                entry[position] += value

    def totals(self) -> dict[str, float]:
        """Sums over everything that was booked."""
        sums = {name: sum(work[at] for work in self.work.values()) for at, name in enumerate(("launches", "traffic", "flops"))}
        sums["syncs"] = sum(count for (kind, _), (count, _) in self.syncs.items() if not kind.endswith("non_blocking"))
        sums["transferred"] = sum(nbytes for _, nbytes in self.syncs.values())
        return sums | {"peak": self.peak, "calls": self.calls}

    def report(self, top: int = 30) -> str:
        """Totals, syncs and work by line as text, the largest counts first; the share of one call where `within` watches."""
        each, totals, by_line = max(1, self.calls), self.totals(), defaultdict(lambda: [0, 0, 0])
        for (where, _), work in self.work.items():
            by_line[where] = [have + new for have, new in zip(by_line[where], work, strict=True)]
        found = [
            f"{totals['launches'] / each:.0f} launches, {totals['traffic'] / each / 1e9:.3f} GB, "
            f"{totals['flops'] / each / 1e12:.4f} TFLOP, {totals['syncs'] / each:.1f} syncs, "
            f"{totals['transferred'] / each / 1e6:.3f} MB between host and device"
            + (f"; each of {each} calls" if self.calls else ""),
            f"{self.peak / 1e9:.3f} GB at the peak",
        ]
        for (kind, where), (count, nbytes) in sorted(self.syncs.items(), key=lambda item: -item[1][0])[:top]:
            found.append(f"{count / each:10.1f} {nbytes / each:14.0f} B  {kind:32} {where}")
        for where, (launches, traffic, flops) in sorted(by_line.items(), key=lambda item: -item[1][0])[:top]:
            found.append(
                f"{launches / each:10.1f} launches {traffic / each / 1e6:12.3f} MB {flops / each / 1e9:12.3f} GFLOP  {where}"
            )
        return "\n".join(found)


LEDGER = Ledger()


def line() -> str:
    """Innermost frame inside of the package under test, and what it called, where that is outside."""
    frame, outside = sys._getframe(1), ""
    while frame:
        name = frame.f_code.co_filename
        if STATE.package and name.startswith(STATE.package) and "site-packages" not in name and name != __file__:
            return f"{name[len(STATE.package) :].lstrip('/')}:{frame.f_lineno}{outside}"
        if name != __file__ and "/torch/" not in name and not outside and "site-packages" in name:
            outside = f" > {name.split('site-packages/')[1].split('/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "(autograd)" + outside


class _Storage:
    """Counts as allocated while some SimTensor looks at it, in blocks of 512 bytes as the caching allocator does."""

    known: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // 512) * 512
        LEDGER.live += self.nbytes
        LEDGER.peak = max(LEDGER.peak, LEDGER.live)

    def __del__(self) -> None:
        if LEDGER:  # not while the interpreter ends
            LEDGER.live -= self.nbytes

    @classmethod
    def of(cls, inner: torch.Tensor) -> _Storage:
        """The one behind a tensor."""
        storage = inner.untyped_storage()
        found = cls.known.get(storage._cdata)
        if found is None:
            found = cls.known[storage._cdata] = cls(storage.nbytes())
        return found


class SimTensor(torch.Tensor):
    """A tensor on the simulated device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, index: int = 0):
        """Data on the host, strided, as a tensor of the device."""
        view = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **view, device=torch.device("cuda", index))
        made.inner, made.token = inner, _Storage.of(inner)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return simulate(func, args, kwargs or {})


def leaves(x) -> list:
    """What lies in tuples, lists and dicts: an operator has nothing else. Torch's own way takes a third of all time."""
    if type(x) is dict:
        x = tuple(x.values())
    return [leaf for part in x for leaf in leaves(part)] if type(x) in (tuple, list) else [x]


def mapped(change, x):
    """The same with each leaf changed."""
    if type(x) is dict:
        return {key: mapped(change, part) for key, part in x.items()}
    return type(x)(mapped(change, part) for part in x) if type(x) in (tuple, list) else change(x)


def is_sim(x) -> bool:
    """Made here, or a tensor whose `data` was set to one that was, as `Module.to` does."""
    return isinstance(x, torch.Tensor) and "inner" in x.__dict__


class SimMode(TorchDispatchMode):
    """Sees the operators that have no SimTensor among their arguments too: factories, and the way from host to device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        torch._C._set_only_lift_cpu_tensors(True)  # of the thread; makes `torch.tensor(..., device)` a host tensor and a `to`
        device = kwargs.get("device")
        if (device is not None and torch.device(device).type == "cuda") or any(map(is_sim, leaves((args, kwargs)))):
            return simulate(func, args, kwargs)
        return func(*args, **kwargs)


@functools.cache
def _no_cuda_kernel() -> set[str]:
    """Operators that have a CPU kernel of their own and none for CUDA, by torch's own table."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    table = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # in C where it can be: seconds
    found, structured = set(), {}
    for entry in table:
        backends = {key.strip() for keys in (entry.get("dispatch") or {}) for key in keys.split(",")}
        name = entry["func"].split("(")[0]
        structured[name] = backends
        backends = backends or structured.get(entry.get("structured_delegate"), set())
        if "CPU" in backends and not any("CUDA" in key or key.startswith("Composite") for key in backends):
            found.add("aten::" + name)
    return found


_HOST_SCALARS = {"fill_", "masked_fill", "masked_fill_", "where", "index_put_", "index_put", "lerp", "scatter", "div", "mul"}
_SYNCS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "_linalg_check_errors", "bincount", "histc",
}  # fmt: skip
_INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_GATHERS = {"index_select", "index", "gather", "embedding"}  # read as much as they write
_SCATTERS = {"index_copy_", "scatter_", "index_put_", "scatter_add_", "index_add_", "_index_put_impl_"}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "baddbmm_", "addmm_"}


def simulate(func, args, kwargs):
    """One operator on the device, or between it and the host."""
    name, given = func.overloadpacket.__name__, leaves((args, kwargs))
    sims = [x for x in given if is_sim(x)]
    hosts = [x for x in given if isinstance(x, torch.Tensor) and not is_sim(x)]
    target = kwargs.get("device")
    target = torch.device(target) if target is not None else sims[0].device
    index = (target.index if target.index is not None else STATE.current) if target.type == "cuda" else 0
    if name in ("_to_copy", "copy_", "_copy_from", "set_data"):
        return _copy(func, name, args, kwargs, target, index)
    if len({x.device.index for x in sims}) > 1:
        raise RuntimeError(TWO_DEVICES.format(index, "another", name))
    if func._schema.name + (f".{func._overloadname}" if func._overloadname != "default" else "") in _no_cuda_kernel():
        raise NotImplementedError(f"Could not run 'aten::{name}' with arguments from the 'CUDA' backend.")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu" and target.type == "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if kwargs.get("pin_memory") and target.type == "cuda":
        raise RuntimeError("Only dense CPU tensors can be pinned")
    _check_hosts(func, name, args, sims, hosts, index)
    if name in _SYNCS:
        LEDGER.sync(name)
    if name in _INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        LEDGER.sync("index by mask")
    meta = STATE.data == "meta"
    if meta and name in ("_local_scalar_dense", "is_nonzero", "equal"):
        return 1.0 if sims[0].dtype.is_floating_point else 1
    if meta:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
    inner, back = {id(x): x.inner for x in sims}, {id(x.inner): x for x in sims}

    def down(x):
        if isinstance(x, torch.device) and x.type == "cuda":
            return torch.device(STATE.data)
        return inner[id(x)] if id(x) in inner else x.to("meta") if meta and isinstance(x, torch.Tensor) else x

    def up(x):
        if not isinstance(x, torch.Tensor) or target.type != "cuda":
            return x
        return back[id(x)] if id(x) in back else SimTensor(x, index)

    result = mapped(up, func(*mapped(down, args), **mapped(down, kwargs)))
    assert all(x.inner.shape == x.shape for x in sims), f"simulator: {func} changes a shape in place"
    _book(func, name, args, sims, [x for x in leaves(result) if isinstance(x, torch.Tensor)])
    return result


def _check_hosts(func, name, args, sims, hosts, index) -> None:
    """A host tensor beside device tensors: a number and an index are taken, anything else is not."""
    pairs = zip(args, func._schema.arguments, strict=False)
    written = leaves([x for x, arg in pairs if arg.alias_info is not None and arg.alias_info.is_write])
    for host in hosts:
        if name in _INDEXED and is_sim(args[0]) and any(host is x for x in args[1]):
            LEDGER.sync("host index to device", host.nbytes)
        elif sims and name in _INDEXED and not is_sim(args[0]):
            raise RuntimeError(INDEX_DEVICE)
        elif sims and (
            host.dim() or any(host is x for x in written) or not (torch.Tag.pointwise in func.tags or name in _HOST_SCALARS)
        ):
            raise RuntimeError(TWO_DEVICES.format(index, "cpu", name))


def _copy(func, name, args, kwargs, target, index):
    """Between devices, or between dtypes on one."""
    source, non_blocking = (args[1] if name == "copy_" else args[0]), kwargs.get("non_blocking", False)
    if name == "copy_":
        target, non_blocking = args[0].device, non_blocking or (len(args) > 2 and args[2])
    from_device, to_device = is_sim(source), target.type == "cuda"
    plain = source.inner if from_device else source
    if from_device != to_device:
        kind = ("host to device" if to_device else "device to host") + (", non_blocking" if non_blocking else ", pageable")
        on_host = source if to_device else args[0] if name == "copy_" else None
        if non_blocking and (on_host is None or not on_host.is_pinned()):
            kind += " but not pinned"
        LEDGER.sync(kind, plain.numel() * plain.element_size())
    if STATE.data == "meta":
        if to_device:
            plain = plain.to("meta")
        elif from_device:
            plain = torch.zeros(plain.shape, dtype=plain.dtype)
    if name == "copy_":
        (args[0].inner if to_device else args[0]).copy_(plain)
        result = args[0]
    else:
        options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
        copied = func(plain, **options)
        result = SimTensor(copied, index) if to_device else copied
    if from_device and to_device:
        _book(func, name, args, [source], [result])
    return result


def _bytes(x: torch.Tensor) -> int:
    size = x.numel() * x.element_size()
    return min(size, x.inner.untyped_storage().nbytes()) if is_sim(x) else size


def _book(func, name, args, sims, results) -> None:
    """A launch and its traffic. Views and empty tensors are free."""
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    view = alias is not None and not alias.is_write
    if STATE.fused or view or name.startswith(("empty", "new_empty", "detach", "lift", "_unsafe_view")):
        return
    if name in _GATHERS:
        traffic = 2 * sum(map(_bytes, results))
    elif name in _SCATTERS:
        traffic = 2 * max([_bytes(x) for x in sims if x is not args[0]], default=0)
    else:
        written = results or [x for x in leaves(args[0]) if is_sim(x)]
        traffic = sum(map(_bytes, {id(x): x for x in sims}.values())) + sum(map(_bytes, written))
    flops = 0
    if name in _PRODUCTS:
        a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
        flops = 2 * a.numel() * b.shape[-1]
    LEDGER.launch(name, 1, traffic, flops)


@contextmanager
def one_kernel(name: str, traffic: int = 0, flops: float = 0):
    """What happens inside is one kernel, without launches, traffic or temporary memory of its own."""
    STATE.fused += 1
    peak = LEDGER.peak
    try:
        yield
    finally:
        STATE.fused -= 1
        LEDGER.peak = max(peak, LEDGER.live)
        LEDGER.launch(name, 1, traffic, flops)


def compile_stub(function=None, **options):
    """`torch.compile`: the function as it is, booked as one kernel that reads its arguments and writes its results."""
    if function is None:
        return lambda function: compile_stub(function, **options)

    def compiled(*args, **kwargs):
        with one_kernel(function.__name__):
            result = function(*args, **kwargs)
        tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if is_sim(x)}
        LEDGER.launch(function.__name__, 0, sum(map(_bytes, tensors.values())))
        return result

    return compiled


class _Attention(torch.autograd.Function):
    """Scaled dot-product attention as one kernel, as flash attention is."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        ctx.flops = 4 * q.numel() * k.shape[2] / (2 if causal else 1)
        with one_kernel("flash attention", 4 * _bytes(q), ctx.flops):
            bias = None if mask is None else mask.inner
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
            inner = [x.inner for x in (q, k, v)]
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*inner, 0.0, causal, attn_mask=bias, scale=scale)
        result, ctx.options = SimTensor(out, q.device.index), {"attn_mask": bias, "scale": scale}
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, result, SimTensor(lse, q.device.index))
        return result

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        with one_kernel("flash attention backward", 8 * _bytes(saved[0]), 2.5 * ctx.flops):
            inner = [x.inner.contiguous() if x.inner.device.type == "cpu" else x.inner for x in (grad, *saved)]
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*inner, 0.0, ctx.causal, **ctx.options)
        return *[SimTensor(x, grad.device.index) for x in found], None, None, None


def _sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return _Attention.apply(q, k, v, attn_mask, is_causal, scale)


def _set_data(tensor, value) -> None:
    _DATA.__set__(tensor, value)
    if is_sim(value):
        tensor.inner, tensor.token = value.inner, value.token
    elif is_sim(tensor):
        del tensor.inner, tensor.token


def _deepcopy(tensor, memo):
    copied = tensor.detach().clone()
    return torch.nn.Parameter(copied, tensor.requires_grad) if getattr(tensor, "_is_param", False) else copied


def _refuse(kind: type[Exception], text: str):
    def refusal(tensor, *args, **kwargs):
        raise kind(text.format(tensor.device))

    return refusal


_DATA = torch.Tensor.data
_METHODS = {  # what no dispatch mode sees; modes of torch functions do not reach the device's thread
    "numpy": _refuse(TypeError, NUMPY),
    "__array__": _refuse(TypeError, NUMPY),
    "pin_memory": _refuse(RuntimeError, "only dense CPU tensors can be pinned, and this one is on {}"),
    "data_ptr": lambda tensor: (1 << 46) + tensor.inner.data_ptr(),
    "untyped_storage": lambda tensor: tensor.inner.untyped_storage(),
    "tolist": lambda tensor: tensor.cpu().tolist(),
    "record_stream": lambda tensor, stream: None,
    "__repr__": lambda tensor, **options: f"{tensor.inner}@{tensor.device}",
    "__format__": lambda tensor, spec: format(tensor.item() if tensor.dim() == 0 else repr(tensor), spec),
    "__deepcopy__": _deepcopy,
}


def _replace(owner, name: str, simulated) -> None:
    """A function of torch that does something else where its first argument is on the device."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def either(tensor, *args, **kwargs):
        return (simulated if is_sim(tensor) else original)(tensor, *args, **kwargs)

    setattr(owner, name, either)


def _lazy_init() -> None:
    STATE.initialized = torch.cuda._initialized = True


def _reset_peak(device=None) -> None:
    """A device without an index is looked up, which initialises; with an index it is not, and the allocator knows none."""
    if not isinstance(device, int) and (device is None or torch.device(device).index is None):
        _lazy_init()
    if not STATE.initialized:
        raise RuntimeError("Invalid device argument : did you call init?")
    LEDGER.peak = LEDGER.live


def enable(package: str = ".", data: str = "cpu", devices: int = 1) -> None:
    """Make `torch.cuda` say that there is an H100.

    Args:
        package: folder whose lines are blamed.
        data: `cpu`, or `meta` for shapes alone (a number that is asked for is then 1, a tensor zeros).
        devices: how many.
    """
    STATE.package, STATE.data, memory = str(Path(package).resolve()), data, 80 << 30
    properties = SimpleNamespace(name="simulated H100", total_memory=memory, major=9, minor=0, multi_processor_count=132)
    properties.gcnArchName = ""

    def waits(device=None) -> None:
        _lazy_init()
        LEDGER.sync("synchronize")

    class Stream:  # a class, because libraries name it in annotations
        def __init__(self, *_, **__) -> None:
            self.record = self.wait_stream = self.wait_event = lambda *_: None
            self.synchronize, self.elapsed_time = waits, lambda other: 1.0

    fakes = {
        "is_available": lambda: True, "is_bf16_supported": lambda *_, **__: True, "is_initialized": lambda: STATE.initialized,
        "_is_compiled": lambda: True, "_is_in_bad_fork": lambda: False, "_lazy_init": _lazy_init, "init": _lazy_init,
        "device_count": lambda: devices, "device": lambda index: nullcontext(), "empty_cache": lambda: None,
        "current_device": lambda: (_lazy_init(), STATE.current)[1],
        "set_device": lambda new: setattr(STATE, "current", new if isinstance(new, int) else torch.device(new).index),
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (_lazy_init(), (properties.major, properties.minor))[1],
        "get_device_properties": lambda device=None: (_lazy_init(), properties)[1],
        "synchronize": waits, "current_stream": Stream, "Event": Stream, "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "memory_allocated": lambda device=None: LEDGER.live, "memory_reserved": lambda device=None: LEDGER.live,
        "reset_peak_memory_stats": _reset_peak,
        "max_memory_allocated": lambda device=None: LEDGER.peak if STATE.initialized else 0,
        "memory_stats": lambda device=None: {"allocated_bytes.all.peak": LEDGER.peak} if STATE.initialized else {},
        "mem_get_info": lambda device=None: (_lazy_init(), (memory - LEDGER.live, memory))[1],
        "manual_seed_all": lambda seed: None, "set_rng_state": lambda new, device="cuda": _lazy_init(),
        "get_rng_state": lambda device="cuda": (_lazy_init(), torch.zeros(16, dtype=torch.uint8))[1],
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.version.cuda = "13.0 (simulated)"
    load, save = torch.load, torch.save

    def simulated_load(file, map_location=None, **options):
        found = load(file, map_location="cpu", **options)
        there = map_location is not None and torch.device(map_location).type == "cuda"
        return tree_map(lambda x: x.to(map_location) if there and isinstance(x, torch.Tensor) else x, found)

    torch.save = lambda value, file, **options: save(tree_map(lambda x: x.cpu() if is_sim(x) else x, value), file, **options)
    torch.load, torch.compile = simulated_load, compile_stub
    warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
    torch.Tensor.data = property(_DATA.__get__, _set_data)
    for name, simulated in _METHODS.items():
        _replace(torch.Tensor, name, simulated)
    _replace(torch.nn.functional, "scaled_dot_product_attention", _sdpa)
    SimMode().__enter__()


def within(target: str) -> None:
    """Book only what happens inside of the function `package.module:Class.method`, and count its calls."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    watched = getattr(owner, name)
    LEDGER.booking = False

    @functools.wraps(watched)
    def counted(*args, **kwargs):
        LEDGER.booking, LEDGER.calls = True, LEDGER.calls + 1
        try:
            return watched(*args, **kwargs)
        finally:
            LEDGER.booking = False

    setattr(owner, name, counted)


def self_test() -> None:
    """What the module promises: raises AssertionError where it does not hold."""
    enable(str(Path(__file__).parent))
    refused = {
        "reset_peak_memory_stats before init": (RuntimeError, lambda: torch.cuda.reset_peak_memory_stats(0)),
        "host and device tensors mixed": (RuntimeError, lambda: torch.ones(2, device="cuda") + torch.ones(2)),
        "host tensor indexed by a device tensor": (RuntimeError, lambda: torch.ones(2)[torch.ones(1, device="cuda").long()]),
        "host generator": (RuntimeError, lambda: torch.rand(2, device="cuda", generator=torch.Generator())),
        "numpy() of a device tensor": (TypeError, lambda: torch.ones(2, device="cuda").numpy()),
    }
    for what, (kind, attempt) in refused.items():
        try:
            attempt()
        except kind as error:
            print(f"ok: {what}: {type(error).__name__}: {error}")
        else:
            raise AssertionError(f"{what} was not refused")
    x = torch.ones(4, 4, device="cuda", requires_grad=True)
    counted = {
        ".item() is one sync": (lambda: x.sum().item(), 1),
        ".cpu() is one sync": (x.cpu, 1),
        "a list as an index is one sync": (lambda: x[:, [1]], 1),
        "matrix product and backward are none": (lambda: (x @ x).sum().backward(), 0),
        "a copy from pinned memory is none": (lambda: torch.ones(2).pin_memory().to("cuda", non_blocking=True), 0),
        "a copy to pinned memory is none": (lambda: torch.empty(4, 4, pin_memory=True).copy_(x.data, non_blocking=True), 0),
        "one that is not pinned is one sync": (lambda: torch.ones(2).to("cuda", non_blocking=True), 1),
    }
    for what, (action, expected) in counted.items():
        LEDGER.clear()
        action()
        found = LEDGER.totals()["syncs"]
        assert found == expected, f"{what}: {found} were counted"
        print(f"ok: {what}")
    assert torch.equal(x.grad.cpu(), torch.full((4, 4), 8.0)), "the gradient is wrong"
    print("ok: the gradient is on the device and right")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-test", action="store_true", help="test the simulator")
    parser.add_argument("--data", choices=("cpu", "meta"), default="cpu", help="values, or shapes alone")
    parser.add_argument("--devices", type=int, default=1, help="number of GPUs")
    parser.add_argument("--package", help="folder whose lines are blamed; default: the script's, or the working directory")
    parser.add_argument("--within", metavar="MODULE:FUNCTION", help="book only what happens inside, and divide by its calls")
    parser.add_argument("--top", type=int, default=30, help="lines of each table")
    parser.add_argument("--json", metavar="FILE", help="write the ledger")
    parser.add_argument("-m", dest="module", action="store_true", help="the first word is a module")
    parser.add_argument("script", nargs="?")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.self_test:
        return self_test()
    if options.script is None:
        parser.error("a script or module is needed")
    folder = Path.cwd() if options.module else Path(options.script).resolve().parent
    sys.modules["tests.gpu.simulated"] = sys.modules["__main__"]  # one ledger for a script that imports it
    sys.argv, sys.path[0] = [options.script, *options.arguments], str(folder)
    enable(options.package or str(folder), options.data, options.devices)
    if options.within:
        within(options.within)
    try:
        if options.module:
            runpy.run_module(options.script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(Path(options.script).resolve()), run_name="__main__")  # lines are known by absolute paths
    finally:
        print(LEDGER.report(options.top), file=sys.stderr)
        if options.json:
            tables = {"syncs": [[*key, *entry] for key, entry in LEDGER.syncs.items()]}
            tables["work"] = [[*key, *entry] for key, entry in LEDGER.work.items()]
            Path(options.json).write_text(json.dumps({"totals": LEDGER.totals()} | tables, indent=1))


if __name__ == "__main__":
    main()
