"""What this machine could reach at most: the rate of its matrix products, and all the rest.

A step is the frozen layers' products, and operations that are none: attention's softmax, GELU,
layer norms, additions, gathers, the thin products of LoRA, the optimizer. Each is timed alone, at
the height of one of plait's chunks, with the fastest way to do it, be it torch's or one of plait's
kernels, once as one process with all threads and once as a process of one thread for each core, all
at the same time. A step can't be shorter than the sum:

    limit = model FLOP / rate / (time in frozen products at full rate + time of the rest)

where the rate is that of the frozen products alone, in whichever of the two manners is faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rivals import plait_steps
from torch.nn import functional
from torch.optim.adamw import adamw
from work import Work, has_bfloat16, workers

from plait.data.tokens import Batch, Tokens, pack
from plait.model.backend import build_backend
from plait.model.kernels.compiled import Kernels, kernels

LIBRARY = "frozen products by torch"
"""What the machine's GEMM rate is measured by."""
WINDOW = 32
"""Slots of the rectangles in which torch's operators compute attention."""
SITES = 2
"""Adapted linear layers in a layer of the model: query and value."""
GROUPS = {
    "fused layers": ("fusedlayer",),
    "frozen products": ("linear",),
    "LoRA's products": ("branches", "aten::mm", "addmm"),
    "attention": ("attention", "softmax", "masked_fill", "bmm"),
    "GELU": ("gelu",),
    "layer norms": ("layer_norm",),
    "optimizer, clipping": ("adam", "norm", "clamp"),
    "gathers": ("index", "copy", "cat", "embedding", "gather", "fill", "zero"),
    "additions": ("add", "mul"),
}
"""Kind of operation -> parts of its operators' names; the first that fits counts."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a step: T tokens of n clients, b texts each, in layers d wide, f inside.

    The frozen weights and all that the layers compute are of `dtype`, factors are float32.
    """

    height: int
    clients: int
    texts: int
    layers: int
    d: int
    f: int
    heads: int
    rank: int
    parameters: int
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, work: Work, tokens: float, dtype: torch.dtype = torch.float32) -> Shape:
        """A chunk of as many clients, of `tokens` a step, as come nearest to its height."""
        model, config = work.model.config, work.config
        backend = build_backend(torch.device("cpu"), dtype)
        at_once = backend.chunk_tokens(work.machine.chunk_tokens)
        clients = max(1, min(len(work.clients), round(at_once / tokens)))
        return cls(
            height=round(clients * tokens), clients=clients, texts=config.batch_size,
            layers=model.num_hidden_layers, d=model.hidden_size, f=model.intermediate_size,
            heads=model.num_attention_heads, rank=config.rank,
            parameters=sum(value.numel() for value in work.start().values()), dtype=dtype,
        )  # fmt: skip

    def randn(self, *size: int, **settings: bool) -> torch.Tensor:
        """Random numbers of the type."""
        return torch.randn(size, dtype=self.dtype, **settings)

    @property
    def kernels(self) -> Kernels | None:
        """Plait's for the type, if there are any."""
        return kernels(self.dtype)

    def batch(self) -> Batch:
        """So many clients' texts, all equally long."""
        length = round(self.height / self.clients / self.texts)
        count = self.clients * self.texts
        places = np.arange(count * length, dtype=np.int32)
        tokens = Tokens(places, places, np.arange(count + 1) * length, np.zeros(count, np.int64))
        return pack(tokens, np.arange(count).reshape(self.clients, -1))

    @property
    def whole_layers(self) -> float:
        """Layers past attention, of which the last computes one token of each text."""
        return self.layers - 1 + self.clients * self.texts / self.height

    def products(self) -> Iterator[tuple[int, int, float, float]]:
        """Frozen products of a step: d_out, d_in, how often forward and how often backward.

        The first layer's input needs no gradient.
        """
        yield 3 * self.d, self.d, self.layers, self.layers - 1
        for d_out, d_in in ((self.d, self.d), (self.f, self.d), (self.d, self.f)):
            yield d_out, d_in, self.whole_layers, self.whole_layers

    def frozen_flop(self) -> float:
        """Operations of the frozen products; frozen weights have no gradient."""
        return sum(
            2 * self.height * d_out * d_in * (forward + backward)
            for d_out, d_in, forward, backward in self.products()
        )

    def model_flop(self) -> float:
        """All operations of products in a chunk's step; LoRA's weights have gradients.

        Attention's own products are left out: under a hundredth at a sentence's length.
        """
        lora = 6 * self.height * SITES * self.rank * 2 * self.d * self.layers
        return self.frozen_flop() + lora


def seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def product_seconds(
    products: Iterable[tuple[int, int, float, float]], height: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Frozen products of a chunk of so many tokens, as `Shape.products` has them.

    Returns:
        Their time in the faster of torch's two ways each, and in the fastest of all.
    """
    prepack = torch.ops.mkldnn._reorder_linear_weight
    library = fastest = 0.0
    for d_out, d_in, forward, backward in products:
        for rows, columns, often in ((d_out, d_in, forward), (d_in, d_out, backward)):
            x, weight = (torch.randn(n, columns, dtype=dtype) for n in (height, rows))
            plain = partial(functional.linear, x, weight)
            linear = torch.ops.mkldnn._linear_pointwise
            packs = dtype is torch.float32 or has_bfloat16()
            packed = packs and partial(linear, x, prepack(weight), None, "none", [], "")
            of_torch = least(plain, packed or None)
            ours = kernels(dtype) if Kernels.suit(weight) else None
            own = ours and partial(ours.linear, x, ours.prepack(weight.t()), None, rows)
            library += often * of_torch
            fastest += often * min(of_torch, seconds(own) if own else of_torch)
    return library, fastest


def rest_seconds(shape: Shape) -> dict[str, float]:
    """Everything else of a chunk's step, by kind: forward and backward, without gradients of W."""
    T, d = shape.height, shape.d
    narrow, ones = shape.randn(T, d), torch.ones(d, dtype=shape.dtype)
    _, mean, rstd = torch.native_layer_norm(narrow, [d], ones, ones, 1e-12)
    norm_back = partial(torch.ops.aten.native_layer_norm_backward, narrow, narrow, [d], mean, rstd,
                        ones, ones, [True, False, False])  # fmt: skip
    whole, every = shape.whole_layers, shape.layers
    fused = shape.kernels
    gelu = fused if shape.dtype is torch.float32 else None  # in bfloat16 torch's own is as fast
    return {
        "attention": every * least(*_attention(shape), fused and _fused_attention(shape, fused)),
        "GELU": whole * least(_gelu(shape), gelu and _fused_gelu(shape, gelu)),
        "layer norms": 2 * whole * seconds(partial(functional.layer_norm, narrow, [d], ones, ones))
        + 2 * whole * seconds(norm_back),
        "additions": 4 * whole * seconds(partial(torch.add, narrow, narrow)),
        "gathers": seconds(partial(torch.index_select, narrow, 0, torch.randperm(T))),
        "LoRA's products": every * least(_lora(shape), fused and _fused_lora(shape, fused)),
        "optimizer, clipping": seconds(_optimizer(shape)),
    }


def least(*ways: Callable[[], Any] | None) -> float:
    """The time of the fastest way that there is."""
    return min(seconds(way) for way in ways if way)


def _attention(shape: Shape) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Torch's fused attention, and plain products: two texts in a window, moved there and back."""
    size = (-(-shape.height // WINDOW), shape.heads, WINDOW, shape.d // shape.heads)
    q, k, v = (shape.randn(*size, requires_grad=True) for _ in range(3))
    text = torch.arange(WINDOW) // (WINDOW // 2)
    same = (text[:, None] == text).expand(size[0], 1, -1, -1)
    grad = shape.randn(*size)
    narrow, wide = (shape.randn(shape.height, width * shape.d) for width in (1, 3))
    places = torch.randperm(shape.height)

    def moved(y: torch.Tensor) -> None:
        torch.autograd.grad(y, (q, k, v), grad)
        for rows in (narrow, wide) * 2:
            rows.index_select(0, places)

    def fused() -> None:
        moved(functional.scaled_dot_product_attention(q, k, v, attn_mask=same))

    def plain() -> None:
        scores = (q @ k.mT * size[-1] ** -0.5).masked_fill(~same, float("-inf"))
        moved(scores.softmax(dim=-1) @ v)

    return fused, plain


def _fused_attention(shape: Shape, fused: Kernels) -> Callable[[], Any]:
    batch = shape.batch()
    qkv, grad = (shape.randn(len(batch.ids), width * shape.d) for width in (3, 1))

    def way() -> None:
        fused.attention(qkv, batch, shape.heads)
        fused.attention(qkv, batch, shape.heads, grad)

    return way


def _gelu(shape: Shape) -> Callable[[], Any]:
    x = shape.randn(shape.height, shape.f)

    def way() -> None:
        functional.gelu(x)
        torch.ops.aten.gelu_backward(x, x)

    return way


def _fused_gelu(shape: Shape, fused: Kernels) -> Callable[[], Any]:
    x = shape.randn(shape.height, shape.f)

    def way() -> None:
        fused.gelu(x).mul_(x)

    return way


def _lora(shape: Shape) -> Callable[[], Any]:
    tokens, d, r = shape.height // shape.clients, shape.d, shape.rank
    low, x = (shape.randn(shape.clients, tokens, width) for width in (r, d))
    A = shape.randn(shape.clients, r, d)

    def way() -> None:
        # Forward and backward, one product each with x, A and B has the shape of one of these.
        for _ in range(3 * SITES):
            torch.bmm(x, A.mT)
            torch.bmm(low, A)

    return way


def _fused_lora(shape: Shape, fused: Kernels) -> Callable[[], Any]:
    batch, d, r = shape.batch(), shape.d, shape.rank
    low, x = (shape.randn(len(batch.ids), width) for width in (SITES * r, d))
    A = shape.randn(shape.clients, SITES * r, d)
    A_t, B = A.mT.contiguous(), shape.randn(shape.clients, d, r)
    B_t = B.mT.contiguous()

    def way() -> None:
        fused.grouped_matmul(low, x, A_t, batch)
        for own in low.chunk(SITES, dim=1):
            fused.grouped_matmul(x, own, B_t, batch, add=True)
            fused.grouped_matmul(own, x, B, batch)
            fused.grouped_matmul_t(own, x, batch)
        fused.grouped_matmul_t(low, x, batch)
        fused.grouped_matmul(x, low, A, batch)

    return way


def _optimizer(shape: Shape) -> Callable[[], Any]:
    value, grad, first, second = torch.rand(4, shape.clients, shape.parameters).unbind()
    step = torch.tensor(1.0)

    def update() -> None:
        grad.mul_((1 / (grad.norm(dim=1) + 1e-6)).clamp(max=1.0)[:, None])
        adamw(
            [value], [grad], [first], [second], [], [step], fused=True, amsgrad=False,
            beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip

    return update


def alone(shape: Shape) -> Callable[[], dict[str, float]]:
    """For a worker: the seconds of a chunk's step by kind of operation, on its threads."""

    def measure() -> dict[str, float]:
        library, fastest = product_seconds(shape.products(), shape.height, shape.dtype)
        return {LIBRARY: library, "frozen products": fastest} | rest_seconds(shape)

    return measure


class Limits:
    """Measures, again and again, in both manners; keeps what each said."""

    def __init__(self, stack: ExitStack, shape: Shape) -> None:
        self.shape = shape
        cores = torch.get_num_threads()
        self._crews = {"all threads": workers(stack, cores, alone, [(shape,)])}
        if cores > 1:
            self._crews["a thread per core"] = workers(stack, 1, alone, [(shape,)] * cores)
        self._heard: dict[str, list[dict[str, float]]] = {manner: [] for manner in self._crews}

    def measure(self) -> None:
        """Once in each manner."""
        for manner, crew in self._crews.items():
            for worker in crew:
                worker.ask()
            answers = [worker.answer() for worker in crew]
            # Workers side by side do a chunk each: seconds a chunk are one over the summed rates.
            self._heard[manner].append(
                {kind: 1 / sum(1 / answer[kind] for answer in answers) for kind in answers[0]}
            )

    def result(self, client_steps_per_second: float, best_peft: float) -> dict[str, Any]:
        """The arithmetic: rates, seconds of a client's step by kind, limit, what was reached."""
        manners = {
            manner: {kind: statistics.median(one[kind] for one in heard) for kind in heard[0]}
            for manner, heard in self._heard.items()
        }
        frozen, model = self.shape.frozen_flop(), self.shape.model_flop()
        rates = {manner: frozen / kinds[LIBRARY] for manner, kinds in manners.items()}
        rate = max(rates.values())
        # Of each kind, too, the faster of the two manners: nothing can be faster.
        floor = {
            kind: min(kinds[kind] for kinds in manners.values()) / self.shape.clients
            for kind in manners["all threads"]
            if kind != LIBRARY
        }
        own_rate = frozen / self.shape.clients / floor["frozen products"]
        at_rate = model / self.shape.clients / rate
        reached = at_rate * client_steps_per_second
        limit = at_rate / sum(floor.values())
        peft = at_rate * best_peft
        return {
            "gemm_flops": rate, "gemm_flops_by_manner": rates, "fastest_gemm_flops": own_rate,
            "height": self.shape.height,
            "model_flop_per_client_step": model / self.shape.clients,
            "seconds_per_client_step": floor, "limit": limit, "reached": reached,
            "reached_of_limit": reached / limit, "peft_reached": peft,
            "speedup_ceiling": 1 / peft, "speedup_limit": limit / peft,
        }  # fmt: skip


def profile(work: Work) -> dict[str, float]:
    """The share of each kind of operation in plait's step, as torch's profiler has it."""
    steps = plait_steps(work)
    steps(3)  # until the memory that is freed is enough for the next
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        steps(1)
    spent = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kinds = (kind for kind, parts in GROUPS.items() if any(part in name for part in parts))
        spent[next(kinds, "other")] += event.self_cpu_time_total
    return {kind: value / sum(spent.values()) for kind, value in spent.items()}


def table(title: str, result: dict[str, Any], shares: dict[str, float]) -> Table:
    """Where a client's step goes: at best, and by plait's own profile."""
    shown = Table("a client's step", "ms at best", "share", "share in plait", title=title)
    floor = result["seconds_per_client_step"]
    for kind in dict.fromkeys([*floor, *shares]):
        least = floor.get(kind)
        shown.add_row(
            kind,
            "" if least is None else f"{1e3 * least:.2f}",
            "" if least is None else f"{least / sum(floor.values()):.1%}",
            f"{shares[kind]:.1%}" if kind in shares else "",
        )
    return shown


def arithmetic(result: dict[str, Any], kind: str = "fp32") -> str:
    """The limit for a kind of number in words and figures."""
    floor = result["seconds_per_client_step"]
    flop, rate = result["model_flop_per_client_step"], result["gemm_flops"]
    frozen = floor["frozen products"]
    rest = sum(floor.values()) - frozen
    manners = ", ".join(f"{n} {v / 1e9:.0f}" for n, v in result["gemm_flops_by_manner"].items())
    return (
        f"{kind}: GEMM rate {rate / 1e9:.0f} GFLOP/s at {result['height']} tokens ({manners}); "
        f"with plait's own products {result['fastest_gemm_flops'] / 1e9:.0f}.\n"
        f"A client's step is {flop / 1e9:.2f} GFLOP on real tokens: {1e3 * flop / rate:.2f} ms at "
        f"that rate.\n"
        f"limit = {1e3 * flop / rate:.2f} / ({1e3 * frozen:.2f} frozen products + "
        f"{1e3 * rest:.2f} the rest) = {result['limit']:.1%} of the GEMM rate\n"
        f"plait reaches {result['reached']:.1%}, {result['reached_of_limit']:.1%} of the limit.\n"
        f"The best PEFT loop in {kind} reaches {result['peft_reached']:.1%}: an engine of "
        f"nothing but products at full rate\nwould be 1 / {result['peft_reached']:.3f} = "
        f"{result['speedup_ceiling']:.2f} times as fast, one at the limit "
        f"{result['speedup_limit']:.2f} times."
    )
