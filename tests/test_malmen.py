"""MALMEN: the normal equation, its gradients, the edit against a plain computation, and training."""

from dataclasses import replace

import pytest
import torch

from clme_lib.editors.malmen.gradients import Cached, edit_row
from clme_lib.editors.malmen.hypernetwork import Hypernetwork, normal_equation
from clme_lib.editors.malmen.training import Training
from clme_lib.editors.registry import get_editor, load_editor
from clme_lib.edits.base import Edit
from clme_lib.forward.label_losses import divergences
from clme_lib.forward.partial import PartialForward
from clme_lib.forward.tokens import tokenize
from clme_lib.support.cache import cache_dir
from clme_lib.support.errors import StudyError

SMALL = {"layers": [2, 3], "rank": 16, "iterations": 6, "meta_lr": 1e-3, "step_size": 1e-2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path))


def trained(subject, cases, **changes):
    editor = load_editor("malmen", subject, **{**SMALL, **changes})
    editor.fit(cases)
    return editor


def test_push_through_is_the_dense_solve():
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(7, n, generator=draw, dtype=torch.float64) for n in (20, 12))
    theta = torch.tensor(0.3, dtype=torch.float64)
    dense = torch.linalg.solve(keys.T @ keys + theta.exp() * torch.eye(20, dtype=torch.float64), keys.T @ values)
    assert torch.allclose(keys.T @ normal_equation(keys, values, theta), dense, rtol=1e-9)


def test_gradients_through_the_normal_equation():
    """Against finite differences, and against autograd through the dense solve, in double precision."""
    draw = torch.Generator().manual_seed(1)
    keys = torch.randn(5, 9, generator=draw, dtype=torch.float64)
    values = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, t: normal_equation(keys, v, t), (values, theta))
    weights = torch.randn(9, 4, generator=draw, dtype=torch.float64)
    ((keys.T @ normal_equation(keys, values, theta)) * weights).sum().backward()
    ours = values.grad.clone(), theta.grad.clone()
    values.grad = theta.grad = None
    system = keys.T @ keys + theta.exp() * torch.eye(9, dtype=torch.float64)
    (torch.linalg.solve(system, keys.T @ values) * weights).sum().backward()
    assert torch.allclose(ours[0], values.grad, rtol=1e-9) and torch.allclose(ours[1], theta.grad, rtol=1e-9)


def test_untrained_network_is_the_identity_and_can_learn():
    draw = torch.Generator().manual_seed(2)
    network = Hypernetwork((6, 4), layers=2, rank=8, blocks=2, step_size=0.5, draw=draw)
    keys, gradients = torch.randn(30, 6, generator=draw) + 3, torch.randn(30, 4, generator=draw)
    network.observe(keys[:10], gradients[:10])
    network.observe(keys[10:11], gradients[10:11])  # a single row must not poison the variance
    network.observe(keys[11:], gradients[11:])
    rows = torch.cat([keys, gradients], -1)
    normal = (rows - rows.mean(0)) / rows.std(0)
    expected = -0.5 * (keys * normal[:, :6]).sum(-1, keepdim=True) * normal[:, 6:]
    update = network(keys, gradients, 1)
    assert torch.allclose(update, expected, rtol=1e-3, atol=1e-4)
    update.pow(2).sum().backward()
    # two of the second factors' gradients are zero for good if the kink at zero passes none
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.outward)


def test_divergence_and_its_gradient(llama):
    draw = torch.Generator().manual_seed(3)
    states, reference = (torch.randn(5, 32, generator=draw).to(llama.device) for _ in range(2))
    states.requires_grad_(True)
    divergence = divergences(llama, states, reference)
    divergence.sum().backward()
    ours = states.grad.clone()
    states.grad = None
    log_reference = llama.model.lm_head(reference).log_softmax(-1)
    plain = (log_reference.exp() * (log_reference - llama.model.lm_head(states).log_softmax(-1))).sum(-1)
    plain.sum().backward()
    assert torch.allclose(divergence, plain, atol=1e-5) and torch.allclose(ours, states.grad, atol=1e-5)


def test_cached_keys_and_gradients_are_those_of_the_weights(subject, cases):
    """``G^T K`` is the gradient of the loss with respect to ``W_l``: what autograd gives for the weight itself."""
    case = cases[0]
    row = edit_row(subject, case.prompt, case.target, "in-context")
    forward = PartialForward(subject, [row], 2, from_lookup=False)
    leaf = subject.down_proj(3).weight.detach().clone().requires_grad_(True)
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=subject.device)
    logits = torch.func.functional_call(
        subject.model, {"model.layers.3.mlp.down_proj.weight": leaf}, kwargs={"input_ids": ids}
    ).logits[0, tokens.lookup : -1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, tokens.lookup + 1 :])
    loss.backward()
    # the last block's output is read at the label columns only, so they hold the whole gradient there
    cached = Cached(forward, [2, 3], "target")
    assert torch.allclose(cached.gradients[3].T @ cached.keys[3], leaf.grad, atol=1e-5)
    assert cached.losses.item() == pytest.approx(loss.item(), rel=1e-5)
    assert len(cached.keys[3]) == len(tokens.target_ids)


def test_released_cache_takes_the_prompts_first_columns(llama, cases):
    case = cases[0]
    row = edit_row(llama, case.prompt, case.target, "alone")
    forward = PartialForward(llama, [row], 2, from_lookup=False)
    cached = Cached(forward, [2, 3], "released")
    count = len(row.target_ids)
    assert torch.equal(cached.keys[2], forward.keys[0, :count])
    assert count < len(tokenize(llama.tokenizer, case.prompt, case.target).prompt_ids)
    assert cached.gradients[3].abs().max() == 0, "nothing reads the last block there"
    assert cached.gradients[2].abs().max() > 0


def test_edits_made_together_are_one_dense_formula(subject, cases, monkeypatch):
    monkeypatch.setattr(get_editor("malmen"), "default_batch", 2)
    editor = trained(subject, cases)
    rows = [edit_row(subject, case.prompt, case.target, "in-context") for case in cases[:3]]
    parts = [Cached(PartialForward(subject, [row], 2, from_lookup=False), [2, 3], "target") for row in rows]
    whole = Edit.compose(editor.edit_together(cases[:3]))
    for n, layer in enumerate((2, 3)):
        keys = torch.cat([part.keys[layer] for part in parts])
        values = editor.network(keys, torch.cat([part.gradients[layer] for part in parts]), n).double()
        keys = keys.double()
        damping = editor.network.log_damping[n].double().exp()
        system = keys.T @ keys + damping * torch.eye(subject.inner_size, device=subject.device)
        dense = torch.linalg.solve(system, keys.T @ values).T.float()
        assert torch.allclose(whole.delta(layer), dense, rtol=1e-3, atol=1e-6)


def test_edit_is_the_dense_formula(subject, cases):
    editor = trained(subject, cases)
    for case, edit in zip(cases, editor.edit(cases)):
        row = edit_row(subject, case.prompt, case.target, "in-context")
        cached = Cached(PartialForward(subject, [row], 2, from_lookup=False), [2, 3], "target")
        for n, layer in enumerate((2, 3)):
            keys = cached.keys[layer].double()
            values = editor.network(cached.keys[layer], cached.gradients[layer], n).double()
            damping = editor.network.log_damping[n].double().exp()
            system = keys.T @ keys + damping * torch.eye(subject.inner_size, device=subject.device)
            dense = torch.linalg.solve(system, keys.T @ values).T.float()
            assert torch.allclose(edit.delta(layer), dense, rtol=1e-3, atol=1e-6)
            assert torch.linalg.matrix_rank(edit.delta(layer)) <= len(row.target_ids)
    alone = [editor.edit([case])[0] for case in cases]
    for edit, other in zip(alone, editor.edit(cases)):
        assert torch.allclose(edit.delta(2), other.delta(2), rtol=1e-3, atol=1e-6)


def test_training_gradient_is_that_of_the_written_update(llama, cases):
    """One step's gradient, through hooks and the normal equation, against autograd through really changed weights."""
    training = Training(llama, load_editor("malmen", llama, **SMALL).hparams, cases[:2], 42)
    training.answers = {prompt: " x" for case in cases for prompt in case.unrelated}
    training.hparams = training.hparams.model_copy(update={"clip": 1e9})
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():  # away from the identity, where some gradients vanish
        for parameter in training.network.outward:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=draw))
    before = {name: parameter.detach().clone() for name, parameter in training.network.state_dict().items()}
    training.step(cases[:2])
    ours = {name: parameter.grad.clone() for name, parameter in training.network.named_parameters()}

    training.network.load_state_dict(before)
    network = training.network
    network.zero_grad()
    rows = [edit_row(llama, case.prompt, case.target, "in-context") for case in cases[:2]]
    cached = Cached(PartialForward(llama, rows, 2, from_lookup=False), [2, 3], "target")
    for layer in (2, 3):
        network.observe(cached.keys[layer], cached.gradients[layer])
    weights = {}
    for n, layer in enumerate((2, 3)):
        keys = cached.keys[layer]
        values = network(keys, cached.gradients[layer], n)
        system = keys.T @ keys + network.log_damping[n].exp() * torch.eye(llama.inner_size, device=llama.device)
        update = torch.linalg.solve(system, keys.T @ values).T
        weights[f"model.layers.{layer}.mlp.down_proj.weight"] = llama.down_proj(layer).weight + update

    def logits(ids, changed):
        return torch.func.functional_call(llama.model, changed, kwargs={"input_ids": ids}).logits[0].float()

    nll, kl = [], []
    for case in cases[:2]:
        tokens = tokenize(llama.tokenizer, case.rephrased[0], case.target)
        ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=llama.device)
        part = logits(ids, weights)[tokens.lookup : -1]
        nll.append(torch.nn.functional.cross_entropy(part, ids[0, tokens.lookup + 1 :], reduction="none"))
        for prompt in case.unrelated:
            tokens = training._answered(prompt)
            ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=llama.device)
            span = slice(tokens.lookup, len(ids[0]) - 1)
            log_reference = logits(ids, {})[span].log_softmax(-1)
            kl.append((log_reference.exp() * (log_reference - logits(ids, weights)[span].log_softmax(-1))).sum(-1))
    (torch.cat(nll).mean() + torch.cat(kl).mean()).backward()
    for name, parameter in network.named_parameters():
        assert torch.linalg.vector_norm(ours[name] - parameter.grad) <= 2e-3 * torch.linalg.vector_norm(
            parameter.grad
        ), name


def test_training_lowers_its_loss_and_is_cached(llama, cases, monkeypatch):
    editor = trained(llama, cases, iterations=60, batch=2)
    training = Training(llama, editor.hparams, sorted(cases, key=lambda case: case.case_id), 42)
    files = list(training.artifact.file.parent.glob("*.safetensors"))
    assert len(files) == 1
    import json

    from safetensors import safe_open

    with safe_open(files[0], framework="pt") as content:
        header = json.loads(content.metadata()["clme"])
    totals = [sum(losses) for losses in header["log"]]
    assert len(totals) == 60 and sum(totals[-10:]) < sum(totals[:10])
    monkeypatch.setattr(Training, "step", lambda *_: pytest.fail("a finished network is loaded, not trained"))
    again = trained(llama, cases, iterations=60, batch=2)
    for edit, other in zip(editor.edit(cases), again.edit(cases)):
        assert torch.equal(edit.delta(2), other.delta(2))


def test_interrupted_training_goes_on(llama, cases, monkeypatch):
    from clme_lib.editors.malmen import training as malmen_training

    whole = trained(llama, cases)
    for file in (cache_dir() / "malmen").glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(malmen_training, "_CHECKPOINT_EVERY", 2)
    step = Training.step
    steps = []

    def dies_at_the_fifth(self, batch):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, batch)

    monkeypatch.setattr(Training, "step", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        trained(llama, cases)
    steps.clear()
    resumed = trained(llama, cases)
    assert len(steps) == 2
    for edit, other in zip(whole.edit(cases), resumed.edit(cases)):
        assert torch.allclose(edit.delta(2), other.delta(2), rtol=1e-4, atol=1e-7)


def test_editing_leaves_the_normaliser_alone(llama, cases):
    editor = trained(llama, cases)
    before = {name: parameter.clone() for name, parameter in editor.network.state_dict().items()}
    editor.edit(cases)
    assert all(torch.equal(before[name], parameter) for name, parameter in editor.network.state_dict().items())


def test_constants_beyond_the_memory_bound_are_recomputed(llama, cases, monkeypatch):
    from clme_lib.editors.malmen import training as malmen_training

    kept = trained(llama, cases)
    for file in (cache_dir() / "malmen").glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(malmen_training, "_KEPT_BYTES", 0)
    for edit, other in zip(kept.edit(cases), trained(llama, cases).edit(cases)):
        assert torch.allclose(edit.delta(2), other.delta(2), rtol=1e-3, atol=1e-6)


def test_misuse_is_explained(llama, cases):
    with pytest.raises(StudyError, match="call fit"):
        load_editor("malmen", llama, **SMALL).edit(cases)
    editor = load_editor("malmen", llama, **SMALL)
    with pytest.raises(StudyError, match="one dataset"):
        editor.fit([cases[0], replace(cases[1], dataset="csne")])
    with pytest.raises(StudyError, match="case 0 has none"):
        editor.fit([replace(cases[0], rephrased=())])
    editor.fit(cases)
    (file,) = Training(llama, editor.hparams, cases, 42).artifact.file.parent.glob("*.safetensors")
    file.write_bytes(b"not safetensors")
    with pytest.raises(StudyError, match="cannot be read as a safetensors file.*remove it, and make it again"):
        load_editor("malmen", llama, **SMALL).fit(cases)
