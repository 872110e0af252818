"""The fast path against a fixed plain procedure, in one run, same threads and dtype.

Plain: a frozen Hugging Face model, one case at a time, a forward pass over prompt and target with all logits and a backward
pass from the target's loss to the edited layer, every step. Ours: ``editor.edit`` on the same cases in batches. Beside each
ratio stands the ceiling that counting multiplications allows: what the plain procedure computes over what the fast path has to.

usage: python benchmarks/fast_path.py [--device cpu|cuda] [--cases 8] [--threads 2]
"""

import argparse
import os
import statistics
import time

import torch

from clme_lib.datasets import load_cases, sample_cases
from clme_lib.editors import load_editor
from clme_lib.prompts import tokenize
from clme_lib.subjects import load_subject

# transferred: the paper's layer and steps; subject: the values selected for the embedded model
SETTINGS = [("grace", "transferred"), ("grace", "subject"), ("ft-l", "subject")]


def plain_step(subject, ids, prompt_length, layer, hook):
    handle = subject.down_proj(layer).register_forward_hook(hook)
    try:
        logits = subject.model(input_ids=ids).logits
    finally:
        handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[0, prompt_length - 1 : -1].float(), ids[0, prompt_length:])
    loss.backward()
    return loss


def plain_grace(subject, tokens, values):
    ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=subject.device)
    value = torch.rand(subject.hidden_size, device=subject.device).requires_grad_(True)
    optimizer = torch.optim.Adam([value], lr=values.lr)

    def replace(_module, _args, output):
        changed = output.clone()
        changed[0, tokens.lookup] = value
        return changed

    for _ in range(values.steps):
        optimizer.zero_grad()
        plain_step(subject, ids, len(tokens.prompt_ids), values.layer, replace)
        optimizer.step()


def plain_ft_l(subject, tokens, values):
    ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=subject.device)
    weight = subject.down_proj(values.layer).weight
    delta = torch.zeros_like(weight, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=values.lr)
    for _ in range(values.steps):
        optimizer.zero_grad()
        loss = plain_step(
            subject, ids, len(tokens.prompt_ids), values.layer, lambda _m, args, out: out + args[0] @ delta.T
        )
        if loss.item() < values.loss_floor:
            break
        optimizer.step()
        with torch.no_grad():
            delta.clamp_(-values.bound, values.bound)


def ceiling(subject, tokenized, values, touched_all):
    """Multiplications of the plain procedure over those of the fast path (steps only; batching and caching are free)."""
    block = sum(p.numel() for p in subject.blocks[0].parameters() if p.dim() == 2)
    head = subject.model.lm_head.weight.numel()
    blocks, above = len(subject.blocks), len(subject.blocks) - 1 - values.layer
    weight = subject.down_proj(values.layer).weight.numel()
    plain = fast = 0
    for tokens in tokenized:
        columns, labels = len(tokens.prompt_ids) + len(tokens.target_ids), len(tokens.target_ids)
        own = 2 * weight * columns if touched_all else 0  # the edited matrix itself: forward and its gradient
        plain += columns * (block * (blocks + above) + 2 * head) + own
        fast += (columns if touched_all else labels) * block * 2 * above + labels * 2 * head + own
    return plain / fast


def seconds(subject, act):
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = load_subject("smollm2-135m", options.device)
    print(f"{subject.name} {subject.dtype_name} on {subject.device}, {options.threads} threads, {options.cases} cases")
    print("editor  values       data  median tokens  plain s/case  ours s/case  ratio  ceiling")
    for name, chosen in SETTINGS:
        for dataset in ("cnle", "csne"):
            measure(subject, name, chosen, dataset, options.cases)


def measure(subject, name, chosen, dataset, count):
    """Time one editor on one data set both ways and print a line."""
    cases = sample_cases(load_cases(dataset), 200, seed=0)
    tokenized = [tokenize(subject.tokenizer, case.prompt, case.target) for case in cases]
    # CSNE stands for long prompts here: at least 110 tokens
    kept = [n for n, tokens in enumerate(tokenized) if dataset == "cnle" or len(tokens.prompt_ids) >= 110][:count]
    cases, tokenized = [cases[n] for n in kept], [tokenized[n] for n in kept]
    editor = load_editor(name, subject, values=chosen)
    plain = plain_grace if name == "grace" else plain_ft_l
    editor.edit(cases[:1])  # warm-up: first calls allocate
    slow = seconds(subject, lambda: [plain(subject, tokens, editor.values) for tokens in tokenized]) / len(cases)
    fast = seconds(subject, lambda: editor.edit(cases)) / len(cases)
    limit = ceiling(subject, tokenized, editor.values, touched_all=name == "ft-l")
    median = statistics.median(len(tokens.prompt_ids) + len(tokens.target_ids) for tokens in tokenized)
    print(
        f"{name:7} {chosen:12} {dataset:5} {median:13.0f} {slow:13.2f} {fast:12.2f} {slow / fast:6.1f} {limit:8.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
