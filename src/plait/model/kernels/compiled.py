"""kernels.c, compiled for this CPU by the machine's own C compiler.

Where there is none, or it fails, there are no kernels, and PyTorch's operators do the same work.
`CC` names another compiler than `cc`; with `CC=false` there are no kernels.

Legend: T tokens of a batch, n its clients.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.data.token_cache import cache_dir
from plait.data.tokens import Batch

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = (
    "-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared",
    # Without it GCC 13 rounds a sum otherwise when it is the only one than when there are several.
    "--param=avoid-fma-max-bits=0",
)  # fmt: skip
CPUS = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}
"""What torch calls the CPU's vector units -> how compilers are told to use them."""
TYPES: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",)}
"""The types that there are kernels for."""

POINTER, LONG, INT, DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double
SIGNATURES = {
    "attention": [POINTER] * 5 + [LONG] * 4 + [INT],
    "interval_attention": [POINTER]
    + [POINTER, LONG, LONG] * 3
    + [POINTER] * 4
    + [LONG] * 5
    + [DOUBLE, INT],
    "interval_attention_gradient": [POINTER] * 3
    + [POINTER, LONG, LONG] * 4
    + [POINTER] * 4
    + [LONG] * 5
    + [DOUBLE, INT],
    "rms_norm": [POINTER] * 3 + [LONG] * 2 + [DOUBLE, INT],
    "rms_norm_gradient": [POINTER] * 4 + [LONG] * 2 + [DOUBLE, INT],
    "rotary": [POINTER] * 2 + [LONG] * 2 + [POINTER] * 2 + [LONG] * 3 + [INT] * 2,
    "gated": [POINTER] * 2 + [LONG] * 2 + [INT],
    "gated_gradient": [POINTER] * 3 + [LONG] * 2 + [INT],
    "gelu": [POINTER] * 2 + [LONG, INT],
    "prepack": [POINTER] * 2 + [LONG] * 4,
    "linear": [POINTER] * 4 + [LONG] * 3 + [INT],
    "layers": [POINTER] * 4 + [LONG, POINTER] + [INT] * 2,
    "layers_gradient": [POINTER] * 6 + [LONG, POINTER] + [INT] * 2,
    "grouped_matmul": [POINTER, LONG] * 2 + [POINTER] * 2 + [LONG] * 3 + [INT] * 2,
    "grouped_matmul_t": [POINTER] + [POINTER, LONG] * 2 + [POINTER] + [LONG] * 3 + [INT],
}


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for arrays of this type on the CPU, if there are any."""
    if dtype not in TYPES:
        return None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    given = (*FLAGS, *CPUS.get(torch.backends.cpu.get_cpu_capability(), ()), *TYPES[dtype])
    # Clang's own OpenMP isn't the one that torch brings; then a kernel keeps to one thread.
    commands = [[*compiler, *given, *more] for more in (("-fopenmp",), ())]
    for made in (_loaded, _compiled):
        for command in commands:
            with suppress(OSError, subprocess.CalledProcessError):
                return Kernels(made(command))
    return None


def _place(command: list[str]) -> Path:
    """Where what the command makes of the source is kept."""
    digest = hashlib.sha256(SOURCE.read_bytes() + shlex.join(command).encode()).hexdigest()[:32]
    return cache_dir() / "kernels" / f"{digest}.so"


def _loaded(command: list[str]) -> ctypes.CDLL:
    """The library that an earlier process compiled.

    Raises:
        OSError: There is none, or it can't be loaded.
    """
    return ctypes.CDLL(str(_place(command)))


def _compiled(command: list[str]) -> ctypes.CDLL:
    """The library, compiled now.

    Raises:
        OSError: There is no compiler, nowhere to write, or the library can't be loaded.
        subprocess.CalledProcessError: The compiler failed.
    """
    library = _place(command)
    library.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and then renamed: several processes may be at it.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        arguments = [*command, str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(arguments, check=True, capture_output=True)
        made.rename(library)
    return _loaded(command)


class Kernels:
    """kernels.c for one type of number. Arrays are on the CPU, and their rows contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Tell ctypes what the functions take."""
        self._library: Any = library
        for name, signature in SIGNATURES.items():
            if hasattr(library, name):
                getattr(library, name).argtypes = signature
                getattr(library, name).restype = None

    @staticmethod
    def suit(weight: Tensor) -> bool:
        """Whether products with this frozen matrix (d_out, d_in) are for `prepack` and `linear`.

        They are made for x86's vector units, for float32, and for widths that are multiples of 16.
        For other machines PyTorch's library knows better, and it has bfloat16's units.
        """
        return (
            weight.dtype is torch.float32
            and torch.backends.cpu.get_cpu_capability() in CPUS
            and all(width % 16 == 0 for width in weight.shape)
        )

    def attention(
        self, qkv: Tensor, batch: Batch, num_heads: int, grad: Tensor | None = None
    ) -> Tensor:
        """softmax(q k^T / sqrt(d / H)) v within each text, (T, 3 d) -> (T, d), or qkv's gradient.

        Args:
            qkv: (T, 3 d).
            batch: Where its texts lie.
            num_heads: H.
            grad: (T, d), the gradient of the result, where that of `qkv` is wanted.
        """
        width = qkv.shape[1] // 3
        out = torch.empty_like(qkv) if grad is not None else qkv.new_empty(len(qkv), width)
        out[batch.num_tokens :] = 0  # the padding
        self._library.attention(
            out.data_ptr(), qkv.data_ptr(), None if grad is None else grad.data_ptr(),
            batch.starts.data_ptr(), batch.lengths.data_ptr(), len(batch.starts),
            int(batch.sizes.max()), num_heads, width // num_heads, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of x, which becomes its derivative."""
        y = torch.empty_like(x)
        self._library.gelu(y.data_ptr(), x.data_ptr(), x.numel(), torch.get_num_threads())
        return y

    def prepack(self, W: Tensor) -> Tensor:
        """W (K, N), K and N multiples of 16, in the order in which `linear` and `call` want it."""
        out = torch.empty(W.numel())
        self._library.prepack(out.data_ptr(), W.data_ptr(), *W.stride(), *W.shape)
        return out

    def linear(self, x: Tensor, W: Tensor, bias: Tensor | None, N: int) -> Tensor:
        """X W + bias, or without a bias x W, with W prepacked: (T, K) -> (T, N)."""
        out = x.new_empty(len(x), N)
        self.call("linear", out, x, W, bias, len(x), N, x.shape[1], torch.get_num_threads())
        return out

    def call(
        self,
        name: str,
        *arguments: Tensor | ctypes.Structure | ctypes.Array[Any] | float | None,
    ) -> None:
        """One of the functions of kernels.c by its name."""
        given = (
            one.data_ptr() if isinstance(one, Tensor)
            else ctypes.addressof(one) if isinstance(one, ctypes.Structure | ctypes.Array)
            else one
            for one in arguments
        )  # fmt: skip
        getattr(self._library, name)(*given)

    def grouped_matmul(
        self, out: Tensor, x: Tensor, W: Tensor, batch: Batch, add: bool = False
    ) -> None:
        """Out = x W, or out += x W, each client's tokens times its own: (T, K), (n, K, N)."""
        _, K, N = W.shape
        self._library.grouped_matmul(
            out.data_ptr(), out.stride(0), x.data_ptr(), x.stride(0), W.data_ptr(),
            batch.bounds.data_ptr(), batch.num_clients, K, N, add, torch.get_num_threads(),
        )  # fmt: skip

    def grouped_matmul_t(self, x: Tensor, y: Tensor, batch: Batch) -> Tensor:
        """(n, M, N) float32, each client's x^T y of its own tokens: (T, M), (T, N)."""
        out = torch.empty(batch.num_clients, x.shape[1], y.shape[1])
        self._library.grouped_matmul_t(
            out.data_ptr(), x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0),
            batch.bounds.data_ptr(), *out.shape, torch.get_num_threads(),
        )  # fmt: skip
        return out
