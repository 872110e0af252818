"""The fast path against a fixed plain procedure, in one run, with the same threads and dtype.

Plain: a frozen Hugging Face model, one case at a time; each step is a forward pass over prompt and target with all logits, and a
backward pass from the target's loss to the edited layer. Ours: ``editor.edit`` on the same cases in batches. Each ratio is shown with
its ceiling from counting multiplications: those of the plain procedure over those that the fast path cannot avoid.
For ROME, MEMIT and PMET the plain procedure reads a case's six rows as one padded batch; for MEMIT and PMET it writes with a dense
solve in double precision and changes the weights in place. In both, statistics and context templates are made before timing starts.

usage: python benchmarks/fast_path.py [--editors grace,ft-l] [--data cnle,csne] [--device cpu|cuda] [--cases 12] [--threads 2] [--out FILE.csv]

With --out, rows in the file with the same editor, values, data, device and threads are replaced.
"""

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from clme_lib.datasets.cases import sample_cases
from clme_lib.datasets.registry import load_cases
from clme_lib.editors.malmen.training import Training
from clme_lib.editors.registry import load_editor
from clme_lib.evaluation.loading import load_subject
from clme_lib.forward.tokens import tokenize
from clme_lib.study import provenance

# transferred: the paper's layer and steps; subject: the values selected for the embedded model
SETTINGS = [
    ("grace", "transferred"),
    ("grace", "subject"),
    ("ft-l", "subject"),
    ("rome", "transferred"),
    ("memit", "transferred"),
    ("pmet", "transferred"),
    ("malmen", "transferred"),
]
SAME = ["editor", "values", "data", "device", "threads"]


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


def plain_rewriting(subject, case, editor):
    """ROME, MEMIT or PMET by their formulas: padded rows, all blocks and logits in each step, dense solves, weights changed in place."""
    values, model = editor.hparams, subject.model
    rows = [tokenize(subject.tokenizer, context + case.prompt, case.target) for context in editor.contexts]
    width = max(len(row.inputs) for row in rows)
    device = subject.device
    ids = torch.full((len(rows), width), subject.tokenizer.pad_token_id, device=device)
    for n, row in enumerate(rows):
        ids[n, : len(row.inputs)] = torch.tensor(row.inputs, device=device)
    each = torch.arange(len(rows), device=device)
    colons = torch.tensor([row.lookup for row in rows], device=device)
    labels = torch.tensor(rows[0].target_ids, device=device)
    columns = colons[:, None] + torch.arange(len(labels), device=device)
    layer = max(getattr(values, "layers", None) or [values.layer])
    block = subject.blocks[layer]
    modules = {"rome": [block.mlp.down_proj], "memit": [block], "pmet": [block.self_attn.o_proj, block.mlp.down_proj]}
    deltas, starts = [], []

    def forward(act):
        handles = [module.register_forward_hook(partial(act, n)) for n, module in enumerate(modules[editor.name])]
        try:
            return model(input_ids=ids).logits.float()
        finally:
            for handle in handles:
                handle.remove()

    def read(_n, _module, _args, output):
        starts.append((output[0] if isinstance(output, tuple) else output)[0, colons[0]].detach())
        deltas.append(torch.zeros_like(starts[-1], requires_grad=True))

    def add(n, _module, _args, output):
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[each, colons] += deltas[n]
        return changed

    with torch.no_grad():
        reference = forward(read)[0, colons[0]].log_softmax(-1)
    optimizer = torch.optim.Adam(deltas, lr=values.lr)
    for step in range(values.steps):
        optimizer.zero_grad()
        logits = forward(add)
        at_labels = logits[each[:, None], columns].log_softmax(-1)
        nll = -at_labels.gather(-1, labels.expand(len(rows), -1)[:, :, None]).mean()
        bare = logits[0, colons[0]].log_softmax(-1)
        decay = sum(delta.norm() / start.norm() ** 2 for delta, start in zip(deltas, starts))
        loss = nll + values.kl_factor * (bare.exp() * (bare - reference)).sum() + values.weight_decay * decay
        if loss.item() < values.loss_floor or step == values.steps - 1:
            break
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for delta, start in zip(deltas, starts):
                delta.mul_((values.clamp * start.norm() / delta.norm()).clamp(max=1.0))
    if editor.name != "rome":
        plain_spread(subject, ids, colons, starts[-1] + deltas[-1].detach(), modules[editor.name][-1], editor)


@torch.no_grad()
def plain_spread(subject, ids, colons, target_state, measured, editor):
    layers, values = sorted(editor.hparams.layers), editor.hparams
    kept = {}

    def keep(_module, args, output):
        kept["in"], kept["out"] = args[0], output[0] if isinstance(output, tuple) else output

    def read(module):
        handle = module.register_forward_hook(keep)
        subject.decoder(input_ids=ids)
        handle.remove()
        return kept["in"], kept["out"]

    saved = {layer: subject.down_proj(layer).weight.clone() for layer in layers}
    for n, layer in enumerate(layers):
        keys = read(subject.down_proj(layer))[0][torch.arange(len(ids), device=ids.device), colons]
        key = (0.5 * keys[0] + 0.5 * keys[1:].mean(0)).double()
        residual = (target_state - read(measured)[1][0, colons[0]]).double() / (len(layers) - n)
        system = values.covariance_weight * editor.moments[layer].matrix.to(ids.device).double() + torch.outer(key, key)
        subject.down_proj(layer).weight += torch.outer(residual, torch.linalg.solve(system, key)).float()
    for layer, weight in saved.items():
        subject.down_proj(layer).weight.copy_(weight)


def plain_malmen(subject, tokens, editor):
    """MALMEN's edit: all blocks, all logits, gradients through autograd, and a dense solve in each layer."""
    ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=subject.device)
    span = slice(tokens.lookup, tokens.lookup + len(tokens.target_ids))
    layers, keys, outputs = sorted(editor.hparams.layers), {}, {}

    def keep(layer, _module, args, output):
        keys[layer] = args[0].detach()
        outputs[layer] = output.detach().requires_grad_(True) if layer == layers[0] else output
        if layer != layers[0]:
            outputs[layer].retain_grad()
        return outputs[layer]

    handles = [subject.down_proj(layer).register_forward_hook(partial(keep, layer)) for layer in layers]
    try:
        logits = subject.model(input_ids=ids).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()
    torch.nn.functional.cross_entropy(logits[span], ids[0, tokens.lookup + 1 :]).backward()
    with torch.no_grad():
        for n, layer in enumerate(layers):
            own = keys[layer][0, span]
            value_updates = editor.network(own, outputs[layer].grad[0, span], n)
            system = own.T @ own + editor.network.log_damping[n].exp() * torch.eye(own.shape[1], device=own.device)
            torch.linalg.solve(system, own.T @ value_updates)


def ceiling(subject, tokenized, values, touched_all):
    """Multiplications of the plain procedure over those of the fast path, both for the full number of steps.

    Batching counts as free; attention's products and the tokens of context templates are left out on both sides.
    """
    layer = max(getattr(values, "layers", None) or [values.layer])
    block = sum(p.numel() for p in subject.blocks[0].parameters() if p.dim() == 2)
    head = subject.model.lm_head.weight.numel()
    blocks, above = len(subject.blocks), len(subject.blocks) - 1 - layer
    weight = subject.down_proj(layer).weight.numel()
    plain = fast = 0
    for tokens in tokenized:
        columns, labels = len(tokens.prompt_ids) + len(tokens.target_ids), len(tokens.target_ids)
        own = 2 * weight * columns if touched_all else 0  # the edited matrix itself: forward and its gradient
        plain += columns * (block * (blocks + above) + 2 * head) + own
        fast += (columns if touched_all else labels) * block * 2 * above + labels * 2 * head + own
        # read once: everything up to the edited layer and, above it, the columns that no edit reaches
        read = columns * (blocks - above) + (0 if touched_all else len(tokens.prompt_ids) * above)
        fast += read * block / values.steps
    return plain / fast


def seconds(subject, act):
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(description, measure):
    """Read the command line, and measure every editor and dataset that it names."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--editors", default="grace,ft-l")
    parser.add_argument("--data", default="cnle,csne")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subject = load_subject("smollm2-135m", options.device)
    print(f"{subject.name} {subject.dtype_name} on {subject.device}, {options.threads} threads, {options.cases} cases")
    machine = provenance.hardware(subject)["name"]
    for name, chosen in SETTINGS:
        if name not in options.editors.split(","):
            continue
        for dataset in options.data.split(","):
            editor, cases, tokenized = prepare(subject, name, chosen, dataset, options.cases)
            tokens = statistics.median(
                len(tokens_of_case.prompt_ids) + len(tokens_of_case.target_ids) for tokens_of_case in tokenized
            )
            row = {
                "editor": name,
                "values": chosen,
                "data": dataset,
                "cases": len(cases),
                "median tokens": round(tokens),
                **measure(editor, cases, tokenized),
                "device": machine,
                "threads": options.threads,
            }
            print(", ".join(f"{column} {value}" for column, value in row.items()), flush=True)
            if options.out:
                write(options.out, row)


def write(file, row):
    """Add a row to a CSV, replacing an earlier row of the same measurement."""
    table = pd.DataFrame([row])
    if file.is_file():
        before = pd.read_csv(file)
        same = (before[SAME].astype(str) == table[SAME].astype(str).iloc[0]).all(axis=1)
        table = pd.concat([before[~same], table])
    file.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(file, index=False)


def prepare(subject, name, chosen, dataset, count):
    """(editor, cases, tokenized cases) for one measurement; the editor is set up and warmed up."""
    cases = sample_cases(load_cases(dataset), 200, seed=0)
    tokenized = [tokenize(subject.tokenizer, case.prompt, case.target) for case in cases]
    # CSNE provides the long prompts here: at least 110 tokens
    kept = [n for n, tokens in enumerate(tokenized) if dataset == "cnle" or len(tokens.prompt_ids) >= 110][:count]
    cases, tokenized = [cases[n] for n in kept], [tokenized[n] for n in kept]
    editor = load_editor(name, subject, values=chosen)
    editor.setup()
    if name == "malmen":  # an untrained network takes as long as a trained one
        editor.network = Training(subject, editor.hparams, cases, 0).network
    editor.edit(cases[:1])  # warm-up: first calls allocate
    return editor, cases, tokenized


def plain_edits(editor, cases, tokenized):
    """Edit every case by the plain procedure."""
    for case, tokens in zip(cases, tokenized):
        if editor.name == "grace":
            plain_grace(editor.subject, tokens, editor.hparams)
        elif editor.name == "ft-l":
            plain_ft_l(editor.subject, tokens, editor.hparams)
        elif editor.name == "malmen":
            plain_malmen(editor.subject, tokens, editor)
        else:
            plain_rewriting(editor.subject, case, editor)


def measure(editor, cases, tokenized):
    """Time editing, plain and fast."""
    subject = editor.subject
    slow = seconds(subject, lambda: plain_edits(editor, cases, tokenized)) / len(cases)
    fast = seconds(subject, lambda: editor.edit(cases)) / len(cases)
    known = editor.name != "malmen"
    limit = ceiling(subject, tokenized, editor.hparams, editor.name == "ft-l") if known else None
    return {
        "plain s/case": round(slow, 2),
        "ours s/case": round(fast, 2),
        "ratio": round(slow / fast, 1),
        "ceiling": limit and round(limit, 1),
    }


if __name__ == "__main__":
    main(__doc__, measure)
