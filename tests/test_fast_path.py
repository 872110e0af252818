"""The fast path equals the plain loop; cases do not depend on each other; the base model is untouched."""

import hashlib
import math

import plain
import pytest
import torch

from clme_lib.datasets.registry import load_cases
from clme_lib.editors.registry import load_editor
from clme_lib.forward import label_losses
from clme_lib.forward.partial import PartialForward, longest_above
from clme_lib.forward.tokens import tokenize
from clme_lib.support.batching import of_like_length


def weights_hash(subject) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(subject.model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def close(actual, expected, tolerance=1e-4):
    return torch.linalg.vector_norm(actual - expected) <= tolerance * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("at_once", [2, 5, 1000])
def test_losses_and_divergences_by_parts_equal_autograd(llama, cases, monkeypatch, at_once):
    """Values and gradient of both, whether the logits of two labels exist at one time or of all."""
    monkeypatch.setitem(label_losses._LABELS_AT_ONCE, "cpu", at_once)
    tokenized = [tokenize(llama.tokenizer, case.prompt, case.target) for case in cases]
    forward = PartialForward(llama, tokenized, 1, from_lookup=True)
    compared = torch.tensor([0, 3, len(forward.labels) - 1])
    places = label_losses.LabelIndices.of(compared)
    drawn = torch.Generator().manual_seed(0)
    shape = len(forward.labels), llama.hidden_size
    start, other = (torch.randn(shape, generator=drawn) for _ in range(2))
    reference = forward.label_losses(other, places, None)[3]
    assert forward.label_losses(other, places, reference)[2].abs().max() < 1e-6
    weights = torch.rand(shape[0], generator=drawn), torch.rand(3, generator=drawn)
    states, same = (start.clone().requires_grad_(True) for _ in range(2))
    losses, _, moved, logs = forward.label_losses(states, places, reference)
    ((weights[0] * losses).sum() + (weights[1] * moved).sum()).backward()
    all_logs = llama.model.lm_head(same).log_softmax(-1)
    plain_losses = -all_logs.gather(-1, forward.labels[:, None])[:, 0]
    plain_moved = (all_logs[compared].exp() * (all_logs[compared] - reference)).sum(-1)
    ((weights[0] * plain_losses).sum() + (weights[1] * plain_moved).sum()).backward()
    assert torch.allclose(losses, plain_losses, atol=1e-5) and torch.allclose(moved, plain_moved, atol=1e-5)
    assert torch.allclose(logs, all_logs[compared], atol=1e-5) and plain_moved.min() > 1e-3
    assert close(states.grad, same.grad, 1e-5)


@pytest.mark.parametrize("from_lookup", [True, False])
def test_partial_forward_gives_the_plain_losses(subject, cases, from_lookup):
    tokenized = [tokenize(subject.tokenizer, case.prompt, case.target) for case in cases]
    lengths = [len(tokens.inputs) for tokens in tokenized]
    assert max(lengths) > 1.2 * min(lengths), "the test needs rows that are not read together"
    for layer in (0, 2, 3):
        forward = PartialForward(subject, tokenized, layer, from_lookup=from_lookup)
        expected = torch.stack([plain.target_loss(subject, tokens) for tokens in tokenized])
        assert torch.allclose(forward.losses(forward.outputs), expected, rtol=1e-4)


def test_groups_hold_every_index_once_and_little_padding():
    lengths = [7, 40, 9, 10, 12, 13, 39, 8]
    groups = of_like_length(lengths, ratio=1.5, most=3)
    assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
    assert all(len(group) <= 3 for group in groups)
    assert all(max(lengths[n] for n in group) <= 1.5 * min(lengths[n] for n in group) for group in groups)
    assert [[lengths[n] for n in group] for group in groups] == [[7, 8, 9], [10, 12, 13], [39, 40]]


def test_padding_is_free_where_only_the_head_is_above(subject):
    by_layer = [longest_above(subject, layer) for layer in range(len(subject.blocks))]
    assert by_layer == sorted(by_layer) and by_layer[0] > 1.5
    assert by_layer[-1] == math.inf


def test_grace_equals_the_plain_loop(subject, cases):
    editor = load_editor("grace", subject, layer=1, steps=12)
    for case, edit in zip(cases, editor.edit(cases)):
        key, value, losses = plain.grace(subject, case, editor.hparams)
        assert torch.allclose(torch.tensor(edit.log.losses), torch.tensor(losses), rtol=1e-4)
        assert close(edit.keys[0], key)
        assert close(edit.values[0], value)
        assert edit.log.losses[-1] < edit.log.losses[0]


def test_ft_l_equals_the_plain_loop(subject, cases):
    editor = load_editor("ft-l", subject, layer=2, steps=4, lr=2e-3, bound=1e-3)
    for case, edit in zip(cases, editor.edit(cases)):
        delta, losses, _ = plain.ft_l(subject, case, editor.hparams)
        assert torch.allclose(torch.tensor(edit.log.losses), torch.tensor(losses), rtol=1e-4)
        same = torch.isclose(edit.delta, delta, rtol=1e-3, atol=1e-6).float().mean()
        assert same >= 0.999
        assert edit.delta.abs().max() <= 1e-3


def test_ft_l_first_gradient(subject, cases):
    """One step from zero is lr * sign(gradient) up to Adam's epsilon: signs must be the plain gradient's."""
    editor = load_editor("ft-l", subject, layer=2, steps=1, lr=1e-4, bound=1e-3)
    for case, edit in zip(cases, editor.edit(cases)):
        _, _, gradient = plain.ft_l(subject, case, editor.hparams)
        expected = -1e-4 * gradient / (gradient.abs() + 1e-8)
        assert torch.isclose(edit.delta, expected, rtol=1e-2, atol=2e-6).float().mean() >= 0.999


def test_ft_l_stops_at_the_loss_floor(llama, cases):
    editor = load_editor("ft-l", llama, layer=2, steps=80, lr=0.02, bound=2.0, loss_floor=3.0)
    edits = editor.edit(cases)
    steps = [edit.log.steps for edit in edits]
    assert all(edit.log.losses[-1] < 3.0 for edit in edits), "the test needs cases that reach the floor"
    assert len(set(steps)) > 1 and max(steps) < 80, "cases stop on their own"
    assert all(len(edit.log.losses) == edit.log.steps + 1 for edit in edits)
    alone = [editor.edit([case])[0] for case in cases]
    assert [edit.log.steps for edit in alone] == steps


@pytest.mark.parametrize("name", ["grace", "ft-l"])
def test_order_and_batch_do_not_matter(subject, cases, name):
    editor = load_editor(name, subject, layer=1, steps=3)
    together = editor.edit(cases)
    backwards = editor.edit(cases[::-1], batch_size=2)[::-1]
    for edit, other in zip(together, backwards):
        assert edit.case_id == other.case_id
        assert edit.log.losses == pytest.approx(other.log.losses, rel=1e-4)
        for a, b in zip(edit.tensors().values(), other.tensors().values()):
            assert torch.isclose(a, b, rtol=1e-3, atol=1e-5).float().mean() >= 0.999


@pytest.mark.parametrize("name", ["none", "grace", "ft-l"])
def test_base_model_is_bit_identical_afterwards(subject, cases, name):
    before = weights_hash(subject)
    editor = load_editor(name, subject, **({} if name == "none" else {"layer": 1, "steps": 2}))
    edits = editor.edit(cases)
    with pytest.raises(RuntimeError, match="on purpose"), subject.applying(edits[:1]):
        subject.model(input_ids=torch.tensor([[1, 2, 3]], device=subject.device))
        raise RuntimeError("on purpose")
    assert weights_hash(subject) == before
    assert not any(module._forward_hooks for module in subject.model.modules())
    assert not subject.decoder._forward_pre_hooks
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in subject.model.parameters())


@pytest.mark.slow
@pytest.mark.subject
def test_real_subject_equals_the_plain_loop(smollm2):
    cases = load_cases("cnle")[:3]
    editor = load_editor("grace", smollm2, steps=4)
    for case, edit in zip(cases, editor.edit(cases)):
        key, value, losses = plain.grace(smollm2, case, editor.hparams)
        assert torch.allclose(torch.tensor(edit.log.losses), torch.tensor(losses), rtol=1e-4)
        assert close(edit.keys[0], key) and close(edit.values[0], value)
    editor = load_editor("ft-l", smollm2, steps=2, values="transferred")
    for case, edit in zip(cases, editor.edit(cases)):
        delta, losses, _ = plain.ft_l(smollm2, case, editor.hparams)
        assert torch.allclose(torch.tensor(edit.log.losses), torch.tensor(losses), rtol=1e-4)
        assert torch.isclose(edit.delta, delta, rtol=1e-3, atol=1e-7).float().mean() >= 0.999
