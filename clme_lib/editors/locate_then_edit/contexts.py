"""Context templates: what ROME, MEMIT and PMET put before a prompt, so that an edit does not depend on the prompt being first.

The empty context and five continuations by the unedited subject (ten tokens each, top-5 sampling). They
depend on the subject and the seed only and are recorded with a run.
"""

from __future__ import annotations

import unicodedata

import torch

from ...forward.tokens import encode
from ...subjects.subject import Subject
from ...support.seeds import generator

OPENINGS = ("The", "Therefore", "Because", "I", "You")
TOKENS = 10  # including the opening word
TOP_K = 5


@torch.no_grad()
def context_templates(subject: Subject, seed: int) -> tuple[str, ...]:
    """The six contexts, the empty one first; each of the others ends in ``". "``."""
    contexts = [""]
    for opening in OPENINGS:
        draw = generator(seed, subject.name, "contexts", opening)
        ids = encode(subject.tokenizer, opening)
        while len(ids) < TOKENS:
            logits = subject.model(input_ids=torch.tensor([ids], device=subject.device)).logits[0, -1]
            top = logits.double().cpu().topk(TOP_K)
            ids.append(int(top.indices[torch.multinomial(top.values.softmax(-1), 1, generator=draw)]))
        text = subject.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        contexts.append(unicodedata.normalize("NFKD", str(text)).replace("\n\n", " ") + ". ")
    return tuple(contexts)
