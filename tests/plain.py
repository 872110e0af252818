"""The plain loop: whole model, batch of one, whole sequence, every step. What the fast path is held to.

Written from the algorithms' description, with weights really changed and outputs really replaced, and nothing shared
with the library but tokenisation and the seeds.
"""

import torch

from clme_lib.prompts import tokenize
from clme_lib.seeds import generator


def target_loss(subject, tokens):
    ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=subject.device)
    logits = subject.model(input_ids=ids).logits.float()[0]
    first = len(tokens.prompt_ids) - 1
    return torch.nn.functional.cross_entropy(
        logits[first : first + len(tokens.target_ids)], ids[0, first + 1 :], reduction="mean"
    )


def grace(subject, case, values, seed=42):
    """(key, value, losses) of GRACE."""
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    column = len(tokens.prompt_ids) - 1
    draw = generator(seed, subject.name, case.dataset, "grace", case.case_id)
    value = torch.rand(subject.hidden_size, generator=draw).to(subject.device).requires_grad_(True)
    optimizer = torch.optim.Adam([value], lr=values.lr)
    kept = {}

    def replace(_module, args, output):
        kept["key"] = args[0][0, column].detach().clone()
        changed = output.clone()
        changed[0, column] = value
        return changed

    handle = subject.down_proj(values.layer).register_forward_hook(replace)
    losses = []
    try:
        for _ in range(values.steps):
            loss = target_loss(subject, tokens)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        handle.remove()
    return kept["key"], value.detach(), losses


def ft_l(subject, case, values):
    """(delta, losses, first gradient) of FT-L."""
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    module = subject.down_proj(values.layer)
    base = module.weight.detach().clone()
    delta = torch.zeros_like(base, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=values.lr)
    handle = module.register_forward_hook(lambda _m, args, out: torch.nn.functional.linear(args[0], base + delta))
    losses, first = [], None
    try:
        for _ in range(values.steps):
            loss = target_loss(subject, tokens)
            losses.append(loss.item())
            if loss.item() < values.loss_floor:
                break
            optimizer.zero_grad()
            loss.backward()
            first = delta.grad.clone() if first is None else first
            optimizer.step()
            with torch.no_grad():
                delta.clamp_(-values.bound, values.bound)
    finally:
        handle.remove()
    return delta.detach(), losses, first
