"""The rates at which this machine computes and reads."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch

from hypersd.errors import RequestError

from .products import Product, cpu_products, torch_product

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
REPEATS = 5  # of which the fastest counts
SMALLEST, LARGEST = 512, 16384  # sides of the square matrices
LONG_ENOUGH = 0.05  # seconds of one product; a larger one would tell no more
COPIED = {"cpu": 128 << 20, "cuda": 1 << 30}  # bytes, of which a cache holds little


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates that a machine reaches.

    Attributes:
        flops_per_second: of a matrix product, multiplications and additions counted apart.
        bytes_per_second: of memory: bytes that a sum reads, or that a copy reads and writes, whichever is faster.
        itemsize: bytes of a number in the dtype that was multiplied; None for that of the weights, whatever it is.
        library: the one whose product was the fastest.
    """

    flops_per_second: float
    bytes_per_second: float
    itemsize: int | None = None
    library: str = "torch"


def machine_rates(device: str, dtype: str, threads: int | None = None) -> Rates:
    """Measure, which takes some seconds.

    On a CPU the fastest of torch, ONNX Runtime and OpenVINO counts, of those that are installed. On a CPU that is slow
    in a type of two bytes, engines compute in float32 what they read in it: the faster counts.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        threads: of the CPU; None for torch's own number.

    Raises:
        RequestError: the dtype is not known.
    """
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not known: expected {', '.join(DTYPES)}")
    place, multiplied = torch.device(device), DTYPES[dtype]
    dtypes = {multiplied, torch.float32} if place.type == "cpu" else {multiplied}
    with _threads(threads):
        flops, library = max(_product_rates(place, dtypes))
        return Rates(flops, _memory_rate(place), multiplied.itemsize, library)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _product_rates(device: torch.device, dtypes: set[torch.dtype]) -> Iterator[tuple[float, str]]:
    """Of every library in every dtype, with the library."""
    for dtype in dtypes:
        if device.type == "cpu":
            products = cpu_products(dtype)
        else:
            products = {"torch": lambda side, dtype=dtype: torch_product(side, dtype, device)}
        for library, make in products.items():
            yield _product_rate(device, make), library


def _product_rate(device: torch.device, make: Callable[[int], Product]) -> float:
    """The fastest of larger and larger matrix products."""
    rate, side, seconds = 0.0, SMALLEST, 0.0
    while side <= LARGEST and seconds < LONG_ENOUGH:
        seconds = _seconds(device, make(side))
        rate, side = max(rate, 2 * side**3 / seconds), 2 * side
    return rate


def _memory_rate(device: torch.device) -> float:
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / _seconds(device, source.sum)
    moved = 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))
    return max(read, moved)


def _seconds(device: torch.device, work: Product) -> float:
    """The shortest of several runs."""
    return min(_one(device, work) for _ in range(REPEATS))


def _one(device: torch.device, work: Product) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
