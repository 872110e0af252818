"""Products with a model's matrices on CPUs for which PyTorch's default library has no wide kernels.

PyTorch multiplies float32 matrices on a CPU with MKL, which uses 512-bit instructions on Intel's processors only. PyTorch carries
oneDNN as well, whose kernels use them on AMD's too: there they take a third to a half of the time, at the same precision. On other
processors and on GPUs nothing changes. ``benchmarks/products.py`` measures both.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


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
    """Let a float32 model's linear layers multiply with oneDNN; their parameters and their class for ``isinstance`` do not change."""
    for module in model.modules():
        if (
            type(module) is torch.nn.Linear
            and module.weight.dtype == torch.float32
            and module.weight.device.type == "cpu"
        ):
            module.__class__ = OneDnnLinear


class OneDnnLinear(torch.nn.Linear):
    """A linear layer that computes ``x W^T + b`` and its gradients with oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Product.apply(input, self.weight, self.bias)


def matrix_product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(..., k) inputs and an (n, k) matrix -> ``inputs weight^T`` (..., n), by the library that is faster here; with gradients for both."""
    on_cpu = inputs.device.type == "cpu" and inputs.dtype == weight.dtype == torch.float32
    return _Product.apply(inputs, weight, None) if on_cpu and is_faster_with_onednn() else inputs @ weight.T


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
