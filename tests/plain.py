"""The plain loop: whole model, batch of one, whole sequence, every step. What the fast path is held to.

Written from the algorithms' description, with weights really changed and outputs really replaced, and nothing shared
with the library but tokenisation and the seeds.
"""

import torch

from clme_lib.forward.tokens import tokenize
from clme_lib.support.seeds import generator


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


def rows_of(subject, case, contexts, lookup="colon"):
    """(ids, column of the lookup token, target ids) of each context's row, read without padding."""
    rows = []
    for context in contexts:
        tokens = tokenize(subject.tokenizer, context + case.prompt, case.target)
        ids = torch.tensor([tokens.prompt_ids + tokens.target_ids], device=subject.device)
        column = len(tokens.prompt_ids) - 1
        if lookup == "content":
            spans = subject.tokenizer(context + case.prompt, add_special_tokens=False, return_offsets_mapping=True)
            end = len(context) + case.prompt.rindex("\n")
            column = max(n for n, (_, last) in enumerate(spans["offset_mapping"]) if last <= end)
        rows.append((ids, column, torch.tensor(tokens.target_ids, device=subject.device)))
    return rows


def run_at(subject, module, ids, column, act):
    """Logits of a whole forward pass in which ``act`` replaces what ``module`` gives at one column."""

    def replace(_module, _args, output):
        whole = output[0] if isinstance(output, tuple) else output
        changed = whole.clone()
        changed[0, column] = act(whole[0, column])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(replace)
    try:
        return subject.model(input_ids=ids).logits[0].float()
    finally:
        handle.remove()


def read_at(subject, module, ids, column):
    """(input, output) of a module at one column of a forward pass."""
    kept = {}

    def keep(_module, args, output):
        whole = output[0] if isinstance(output, tuple) else output
        kept["in"], kept["out"] = args[0][0, column].detach() if args else None, whole[0, column].detach()

    handle = module.register_forward_hook(keep)
    try:
        with torch.no_grad():
            subject.model(input_ids=ids)
    finally:
        handle.remove()
    return kept["in"], kept["out"]


def learn(subject, case, contexts, values, modules, pmet=False):
    """The deltas of one case at the given modules, and the losses; every row a forward pass of its own."""
    rows = rows_of(subject, case, contexts, values.lookup)
    ids, column, _ = rows[0]
    starts = [read_at(subject, module, ids, column)[1] for module in modules]
    deltas = [torch.zeros_like(start, requires_grad=True) for start in starts]
    optimizer = torch.optim.Adam(deltas, lr=values.lr)
    reference, losses, factor = None, [], 1.0
    for iteration in range(values.steps):
        likelihoods, hits = [], True
        for n, (ids, column, labels) in enumerate(rows):
            handles = []
            for module, delta in zip(modules, deltas):

                def add(_module, _args, output, delta=delta, column=column):
                    whole = output[0] if isinstance(output, tuple) else output
                    changed = whole.clone()
                    changed[0, column] = changed[0, column] + delta
                    return (changed, *output[1:]) if isinstance(output, tuple) else changed

                handles.append(module.register_forward_hook(add))
            try:
                logits = subject.model(input_ids=ids).logits[0].float()
            finally:
                for handle in handles:
                    handle.remove()
            first = ids.shape[1] - len(labels) - 1
            logp = logits.log_softmax(-1)[first : first + len(labels)]
            likelihoods.append(-logp[range(len(labels)), labels].mean())
            hits = hits and bool((logp.argmax(-1) == labels).all())
            if n == 0:
                bare = logp[0]
        reference = bare.detach() if reference is None else reference
        kl = values.kl_factor * (bare.exp() * (bare - reference)).sum()
        decay = values.weight_decay * sum(d.norm() / s.norm() ** 2 for d, s in zip(deltas, starts))
        loss = factor * torch.stack(likelihoods).mean() + kl + decay
        losses.append(loss.item())
        if losses[-1] < values.loss_floor:
            break
        if pmet:
            if hits and kl.item() <= values.kl_stop:
                break
            factor = values.agreement_factor if hits else 1.0
        if iteration == values.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for delta, start in zip(deltas, starts):
                if delta.norm() > values.clamp * start.norm():
                    delta.mul_(values.clamp * start.norm() / delta.norm())
    return [delta.detach() for delta in deltas], starts, losses


def rome(subject, case, contexts, values, moment=None):
    """(the update of W_l written out, losses) of ROME; the key is weighed by the inverse of a ``moment``, if there is any."""
    module = subject.down_proj(values.layer)
    (delta,), (start,), losses = learn(subject, case, contexts, values, [module])
    rows = rows_of(subject, case, contexts, values.lookup)
    direction = torch.stack([read_at(subject, module, ids, column)[0] for ids, column, _ in rows]).mean(0)
    if moment is not None:
        direction = torch.linalg.solve(moment.double(), direction.double()).float()
    direction = direction / direction.norm()
    ids, column, _ = rows[0]
    key, output = read_at(subject, module, ids[:, : column + 1], column)
    return torch.outer((start + delta - output) / (key @ direction), direction), losses


def spread(subject, cases, contexts, values, moments, name, earlier=None):
    """({layer: update written out}, losses of each case) of MEMIT, PMET, AlphaEdit or EMMET for cases that are written together, the
    weights really changed and a dense solve at each layer; ``earlier`` has the keys (H, d_f) that count like other texts, by layer."""
    last = subject.blocks[max(values.layers)]
    pmet = name == "pmet"
    modules = [last.mlp.down_proj] if pmet else [last]
    if pmet and values.attention:
        modules = [last.self_attn.o_proj, *modules]
    target_states, losses, prompts = [], [], []
    for case in cases:
        (*_, delta), (*_, start), of_case = learn(subject, case, contexts, values, modules, pmet=pmet)
        target_states.append(start + delta)
        losses.append(of_case)
        rows = rows_of(subject, case, contexts, values.lookup)
        prompts.append([(ids[:, : column + 1], column) for ids, column, _ in rows])
    saved = {layer: subject.down_proj(layer).weight.detach().clone() for layer in values.layers}
    updates = {}
    try:
        for n, layer in enumerate(sorted(values.layers)):
            module = subject.down_proj(layer)
            keys, residuals = [], []
            for of_case, target_state in zip(prompts, target_states):
                read = [read_at(subject, module, ids, column)[0].double() for ids, column in of_case]
                keys.append(read[0] / 2 + torch.stack(read[1:]).mean(0) / 2)
                held = read_at(subject, modules[-1], *of_case[0])[1]
                left = len(values.layers) - n
                residuals.append((target_state - held).double() / (left**0.5 if pmet else left))
            columns, residuals = torch.stack(keys).T, torch.stack(residuals).T
            others = torch.zeros(len(columns), len(columns), dtype=torch.double)
            if earlier and layer in earlier:
                others += earlier[layer].T.double() @ earlier[layer].double()
            if name == "alphaedit":
                eigenvalues, vectors = torch.linalg.eigh(moments[layer].double())
                project = sum(
                    torch.outer(v, v) for e, v in zip(eigenvalues, vectors.T) if e < values.eigenvalue_threshold
                )
                dense = project @ (columns @ columns.T + others) + values.ridge * torch.eye(
                    len(columns), dtype=torch.double
                )
                updates[layer] = torch.linalg.solve(dense, project @ columns @ residuals.T).T.float()
            elif name == "emmet":
                inverse = torch.linalg.inv(values.covariance_weight * moments[layer].double() + others / values.ridge)
                small = columns.T @ inverse @ columns + values.ridge * torch.eye(len(cases), dtype=torch.double)
                updates[layer] = (residuals @ torch.linalg.inv(small) @ columns.T @ inverse).float()
            else:
                dense = values.covariance_weight * moments[layer].double() + others + columns @ columns.T
                updates[layer] = torch.linalg.solve(dense, columns @ residuals.T).T.float()
            with torch.no_grad():
                module.weight += updates[layer]
    finally:
        with torch.no_grad():
            for layer, weight in saved.items():
                subject.down_proj(layer).weight.copy_(weight)
    return updates, losses


def tuned(subject, cases, module, lr, passes, end):
    """(delta, losses by pass) of Adam on one matrix, every step on the mean loss of all cases."""
    rows = [tokenize(subject.tokenizer, case.prompt, case.target, end) for case in cases]
    base = module.weight.detach().clone()
    delta = torch.zeros_like(base, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=lr)
    handle = module.register_forward_hook(lambda _m, args, out: torch.nn.functional.linear(args[0], base + delta))
    losses = []
    try:
        for _ in range(passes):
            of_cases = [target_loss(subject, row) for row in rows]
            losses.append([loss.item() for loss in of_cases])
            optimizer.zero_grad()
            torch.stack(of_cases).mean().backward()
            optimizer.step()
    finally:
        handle.remove()
    return delta.detach(), losses


def adapted(subject, case, values, starts):
    """({layer: (B, A)}, losses) of adapters on all down_proj, from ``starts`` {layer: A}."""
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    pairs, handles = {}, []
    for layer, start in starts.items():
        module = subject.down_proj(layer)
        left = torch.zeros(module.out_features, values.rank, requires_grad=True)
        right = start.clone().requires_grad_(True)
        pairs[layer] = left, right
        handles.append(module.register_forward_hook(lambda _m, args, out, a=left, b=right: out + args[0] @ (a @ b).T))
    optimizer = torch.optim.Adam([part for pair in pairs.values() for part in pair], lr=values.lr)
    losses = []
    try:
        for _ in range(values.steps):
            loss = target_loss(subject, tokens)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    return pairs, losses


def keys_and_gradients(subject, case, layers):
    """{layer: (K, G)} at the columns that predict the target, and the loss; one pass with gradients at every output."""
    tokens = tokenize(subject.tokenizer, case.prompt, case.target)
    first = len(tokens.prompt_ids) - 1
    columns = slice(first, first + len(tokens.target_ids))
    kept, handles = {}, []
    for layer in layers:

        def keep(_module, args, output, layer=layer):
            leaf = torch.zeros_like(output, requires_grad=True)
            kept[layer] = args[0].detach()[0], leaf
            return output + leaf

        handles.append(subject.down_proj(layer).register_forward_hook(keep))
    try:
        loss = target_loss(subject, tokens)
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {layer: (keys[columns], leaf.grad[0][columns]) for layer, (keys, leaf) in kept.items()}, loss.item()
