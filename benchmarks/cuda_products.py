"""Products of few rows with weights on a GPU: ours, as shares of read bandwidth, and beside PyTorch's operators."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import kernels  # noqa: F401  registers our operators
from benchmarks.cuda_common import DEVICE, SCHEMES, fill_random, graph_milliseconds, read_speed
from benchmarks.grow import shape_args
from checkpoint import bits_and_groupsize, empty_model
from model import Linear

ROWS = (1, 6, 16)


def linear_sizes(shape: str) -> dict[str, tuple[int, int]]:
    """Input and output channels of the linear layers of a block, and of the output layer."""
    model = empty_model(shape_args(shape), None, torch.bfloat16)
    layers = {name: layer for name, layer in model.layers[0].named_modules() if isinstance(layer, Linear)}
    layers["output"] = model.output
    return {name.rpartition(".")[2]: (layer.n_in, layer.n_out) for name, layer in layers.items()}


def copies(n_in: int, n_out: int) -> int:
    """Number of weights that together miss the L2 cache."""
    return max(2, 2**29 // (n_in * n_out))


def random_layers(n_in: int, n_out: int, bits: int, groupsize: int) -> list[Linear]:
    """Linear layers on the GPU that together miss the L2 cache."""
    with torch.device(DEVICE):
        layers = [Linear(n_in, n_out).bfloat16() for _ in range(copies(n_in, n_out))]
        for layer in layers:
            layer.set_storage(bits, groupsize)
            fill_random(layer)
    return layers


def product_milliseconds(products: list[Callable], rows: int, n_in: int) -> float:
    """Time of one of `products`, called one after another with random rows."""
    x = torch.randn(1, rows, n_in, device=DEVICE).bfloat16()
    return graph_milliseconds(lambda: [multiply(x) for multiply in products]) / len(products)


def products(shape: str, scheme: str) -> dict:
    """The share of read bandwidth of each linear layer, for 1, 6 and 16 rows."""
    speed = read_speed()
    result = {"GB/s": round(speed)}
    for name, (n_in, n_out) in linear_sizes(shape).items():
        layers = random_layers(n_in, n_out, *bits_and_groupsize(name, SCHEMES[scheme]))
        size = sum(tensor.nbytes for tensor in layers[0].buffers())
        for rows in ROWS:
            result[f"{name} {rows}"] = round(size / product_milliseconds(layers, rows, n_in) / 1e6 / speed, 3)
    return result


def int4pack_products(n_in: int, n_out: int) -> list[Callable]:
    """PyTorch's own products of rows with int4 weights in groups of 32."""

    def new_product() -> Callable:
        weight = torch.randint(0, 256, (n_out, n_in // 2), dtype=torch.uint8, device=DEVICE)
        packed = torch.ops.aten._convert_weight_to_int4pack(weight, 8)
        scales_and_zeros = torch.rand(n_in // 32, n_out, 2, device=DEVICE).bfloat16()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x[0], packed, 32, scales_and_zeros)

    return [new_product() for _ in range(copies(n_in, n_out))]


def linear_products(n_in: int, n_out: int) -> list[Callable]:
    """F.linear with bfloat16 weights."""
    return [lambda x, layer=layer: F.linear(x, layer.weight) for layer in random_layers(n_in, n_out, 16, 0)]


def library(shape: str, scheme: str) -> dict:
    """Microseconds of each linear layer of a block by PyTorch's operators and by ours, for 1, 6 and 16 rows."""
    makers = {
        "ours bf16": lambda n_in, n_out: random_layers(n_in, n_out, 16, 0),
        "F.linear bf16": linear_products,
        "ours g32": lambda n_in, n_out: random_layers(n_in, n_out, 4, 32),
        "_weight_int4pack_mm g32": int4pack_products,
    }
    result = {}
    for name, (n_in, n_out) in linear_sizes(shape).items():
        for label, make in makers.items():
            layers = make(n_in, n_out)
            times = [product_milliseconds(layers, rows, n_in) for rows in ROWS]
            result[f"{name} {label}"] = [round(1000 * time, 1) for time in times]
    return result
