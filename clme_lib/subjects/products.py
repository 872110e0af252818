"""Products with a model's matrices, by the faster of the two libraries that PyTorch has for a CPU.

PyTorch multiplies float32 matrices with MKL. On AMD's processors with 512-bit instructions its other library, oneDNN, takes about
half the time at the same precision, so products go there. On other processors and on GPUs nothing changes.
``benchmarks/products.py`` measures both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

_SMALLEST = 2**16  # elements of a matrix; calling oneDNN takes longer than a product with a smaller matrix


@cache
def is_faster_with_onednn() -> bool:
    """Whether this machine's processor is AMD's and has 512-bit instructions, and PyTorch uses MKL and has oneDNN's product."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    processors = Path("/proc/cpuinfo")
    return processors.is_file() and "AuthenticAMD" in processors.read_text(errors="replace")


def use_onednn(model: torch.nn.Module) -> None:
    """Let a model's linear layers multiply with oneDNN, if their matrices are large and in float32 on the CPU.

    Their parameters do not change, nor does what ``isinstance`` says of them.
    """
    for module in model.modules():
        if type(module) is torch.nn.Linear and _is_large(module.weight):
            module.__class__ = OneDnnLinear


class OneDnnLinear(torch.nn.Linear):
    """A linear layer that computes ``x W^T + b`` and its gradients with oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Product.apply(input, self.weight, self.bias)


def matrix_product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(..., k) inputs and an (n, k) matrix -> ``inputs weight^T`` (..., n), by the library that is faster here; with gradients for both."""
    if inputs.dtype == torch.float32 and _is_large(weight) and is_faster_with_onednn():
        return _Product.apply(inputs, weight, None)
    return inputs @ weight.T


def _is_large(weight: torch.Tensor) -> bool:
    return weight.numel() >= _SMALLEST and weight.dtype == torch.float32 and weight.device.type == "cpu"


class _Product(torch.autograd.Function):
    """(..., k) inputs and an (n, k) matrix -> (..., n); oneDNN's own operator has no gradient."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return _multiply(inputs, weight, bias)

    @staticmethod
    def backward(ctx, upstream):
        inputs, weight = ctx.saved_tensors
        rows = upstream.reshape(-1, upstream.shape[-1])
        of_inputs = _multiply(upstream, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = _multiply(rows.t(), inputs.reshape(-1, inputs.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        return of_inputs, of_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None


def _multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not inputs.numel():  # oneDNN refuses empty matrices
        return torch.nn.functional.linear(inputs, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product
