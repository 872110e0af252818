"""Products by oneDNN equal PyTorch's own, with their gradients; which models use them."""

import copy

import pytest
import torch

from clme_lib.subjects import products, subject
from clme_lib.subjects.products import OneDnnLinear, is_faster_with_onednn, matrix_product, use_onednn
from clme_lib.subjects.subject import prepare

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch):
    monkeypatch.setattr(products, "_SMALLEST", 1)


@pytest.fixture
def processor(monkeypatch):
    """Say which library is faster, as if on another processor."""
    return lambda faster: monkeypatch.setattr(products, "is_faster_with_onednn", lambda: faster)


def with_gradients(act, *inputs):
    """The result, and the gradients of a weighted sum of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = act(*leaves)
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(1))
    (result * weights).sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@needs_onednn
@pytest.mark.parametrize("shape", [(5,), (1, 5), (40, 5), (3, 4, 5), (2, 7, 1, 5), (0, 5), (2, 0, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_and_its_gradients(shape, has_bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 6, has_bias)
    other = copy.deepcopy(linear)
    use_onednn(other)
    assert type(other) is OneDnnLinear and isinstance(other, torch.nn.Linear)
    inputs = torch.randn(shape)
    for expected, computed in zip(with_gradients(linear, inputs), with_gradients(other, inputs), strict=True):
        assert computed.shape == expected.shape and torch.allclose(computed, expected, atol=1e-6)
    linear(inputs).sum().backward()
    other(inputs).sum().backward()
    for expected, computed in zip(linear.parameters(), other.parameters(), strict=True):
        assert torch.allclose(computed.grad, expected.grad, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("faster", [True, False])
def test_a_product_and_its_gradients(processor, faster):
    """Inputs may be views whose rows are not next to each other in memory."""
    processor(faster)
    drawn = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(5, 7, generator=drawn).T, torch.randn(9, 10, generator=drawn)[:, ::2]
    results = with_gradients(matrix_product, inputs, weight)
    for expected, computed in zip(with_gradients(lambda left, right: left @ right.T, inputs, weight), results):
        assert torch.allclose(computed, expected, atol=1e-6)


def test_other_types_multiply_as_pytorch_does(processor):
    processor(True)
    for dtype in (torch.float64, torch.bfloat16):
        inputs, weight = torch.randn(4, 5).to(dtype), torch.randn(6, 5).to(dtype)
        assert torch.equal(matrix_product(inputs, weight), inputs @ weight.T)
        linear = torch.nn.Linear(5, 6).to(dtype)
        use_onednn(linear)
        assert type(linear) is torch.nn.Linear


def test_small_matrices_multiply_as_pytorch_does(monkeypatch):
    monkeypatch.setattr(products, "_SMALLEST", 31)
    small, large = torch.nn.Linear(5, 6), torch.nn.Linear(5, 7)
    use_onednn(torch.nn.ModuleList([small, large]))
    assert (type(small), type(large)) == (torch.nn.Linear, OneDnnLinear)


@pytest.mark.parametrize("faster", [True, False])
def test_a_subject_uses_what_is_faster(llama, monkeypatch, faster):
    monkeypatch.setattr(subject, "is_faster_with_onednn", lambda: faster)
    model = copy.deepcopy(llama.model).cpu()
    prepared = prepare("tiny", model, llama.tokenizer, llama.settings, "random")
    layers = [module for module in prepared.model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(layer) is OneDnnLinear for layer in layers} == {faster}


@pytest.mark.parametrize(
    ("capability", "vendor", "faster"),
    [("AVX512", "AuthenticAMD", True), ("AVX2", "AuthenticAMD", False), ("AVX512", "GenuineIntel", False)],
)
def test_the_processor_decides(tmp_path, monkeypatch, capability, vendor, faster):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(products, "Path", lambda _: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", object(), raising=False)
    assert is_faster_with_onednn.__wrapped__() is faster


@needs_onednn
def test_an_edited_subject_multiplies_the_same_way(llama):
    """Editing copies the modules; what they multiply with stays."""
    plain = copy.deepcopy(llama.model).cpu()
    model = copy.deepcopy(plain)
    use_onednn(model)
    ids = torch.arange(6)[None]
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
