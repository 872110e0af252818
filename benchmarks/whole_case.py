"""A whole case, its edit and its evaluation, against a fixed plain procedure, in one run, same threads and dtype.

Plain: the plain edit of fast_path.py, then one call of Hugging Face's ``generate`` for each text of the case (the target and the
rephrased prompt, five neighbours, two sampled texts), one prompt at a time from the same edit. Ours: ``editor.edit`` and ``evaluate`` on
the same cases together. The unedited subject's answers to the neighbours are there before the clock starts, in both, as in the
published datasets. So are, in ours, the texts that a codebook's radius leaves unedited, because all such editors share
them. *Same texts* counts the greedy ones that both write alike.

usage: python benchmarks/whole_case.py, with the options of fast_path.py
"""

import torch
from fast_path import main, plain_edits, seconds

from clme_lib.evaluation.evaluate import evaluate
from clme_lib.evaluation.generation import FLUENCY_TOKENS, FLUENCY_TOP_K, SPECIFICITY_TOKENS
from clme_lib.forward.tokens import token_budget


def plain_texts(subject, case, edit):
    """The greedy texts of a case from its edited subject, and two sampled ones, one after another."""
    own = [case.prompt, *case.rephrased]
    budget = token_budget(subject.tokenizer, case.prompt, case.target, "clean")
    asked = [(prompt, budget) for prompt in own] + [(prompt, SPECIFICITY_TOKENS) for prompt in case.unrelated]
    with subject.applying([edit]):
        greedy = [write(subject, prompt, tokens, do_sample=False) for prompt, tokens in asked]
        for prompt in own:
            write(subject, prompt, FLUENCY_TOKENS, do_sample=True, top_k=FLUENCY_TOP_K, top_p=1.0, temperature=1.0)
    return greedy


def write(subject, prompt, tokens, **decoding):
    """One text by Hugging Face's own loop."""
    batch = subject.tokenizer(prompt, return_tensors="pt").to(subject.device)
    pad = subject.tokenizer.pad_token_id
    ids = subject.model.generate(**batch, max_new_tokens=tokens, pad_token_id=pad, **decoding)
    return subject.tokenizer.decode(
        ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


@torch.no_grad()
def evaluate_plainly(subject, cases, edits):
    """Greedy texts of every case."""
    return [text for case, edit in zip(cases, edits) for text in plain_texts(subject, case, edit)]


def measure(editor, cases, tokenized):
    """Time editing and evaluating both ways."""
    subject = editor.subject
    edits = editor.edit(cases)
    evaluate(subject, cases, edits)  # what the unedited subject writes is kept
    texts, again, tables = [], [], []

    def plain():
        plain_edits(editor, cases, tokenized)
        texts.extend(evaluate_plainly(subject, cases, edits))

    slow = seconds(subject, plain) / len(cases)
    editing = seconds(subject, lambda: again.extend(editor.edit(cases))) / len(cases)
    evaluating = seconds(subject, lambda: tables.append(evaluate(subject, cases, again))) / len(cases)
    measures = ("effectiveness", "generalization", "specificity")
    ours = [text for _, row in tables[0].iterrows() for measure in measures for text in row[f"generated_{measure}"]]
    return {
        "plain s/case": round(slow, 2),
        "our edit s/case": round(editing, 2),
        "our evaluation s/case": round(evaluating, 2),
        "ratio": round(slow / (editing + evaluating), 1),
        "same texts": f"{sum(map(str.__eq__, texts, ours))} of {len(texts)}",
    }


if __name__ == "__main__":
    main(__doc__, measure)
