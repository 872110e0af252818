"""Templates, tokenisation in context, and generation against the library it stands in for."""

import pytest
import torch

from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.edits.weights import LowRankUpdate
from clme_lib.evaluation.generation import Request, generate, gumbel
from clme_lib.forward.tokens import token_budget, tokenize
from clme_lib.support.errors import StudyError
from clme_lib.support.seeds import generator, seed_of, seeded_order


def test_templates_are_literal():
    assert CNLE.prompt("sort {x}") == "Intent: sort {x}\nCode:"
    assert CSNE.prompt("def f():\n    pass") == "Code: def f():\n    pass\nDescription:"
    assert CSNE.text(CSNE.prompt("x = 1")) == "x = 1"


def test_targets_are_tokenised_in_context(llama):
    prompt, target = CNLE.prompt("sort `xs`"), "xs.sort()"
    tokens = tokenize(llama.tokenizer, prompt, target)
    whole = llama.tokenizer(f"{prompt} {target}", add_special_tokens=False).input_ids
    assert list(tokens.prompt_ids + tokens.target_ids) == whole
    assert llama.tokenizer.decode(tokens.target_ids) == " " + target
    assert llama.tokenizer.decode(tokens.prompt_ids[tokens.lookup : tokens.lookup + 1]) == ":"
    assert token_budget(llama.tokenizer, prompt, target, "clean") == len(tokens.target_ids)
    alone = len(llama.tokenizer(target, add_special_tokens=False).input_ids)
    assert token_budget(llama.tokenizer, prompt, target, "compat") == alone


@pytest.mark.parametrize("target", ["", "   "])
def test_empty_targets_are_refused(llama, target):
    with pytest.raises(StudyError, match="empty"):
        tokenize(llama.tokenizer, CNLE.prompt("a"), target)


def test_a_prompt_must_end_in_a_colon(llama):
    with pytest.raises(StudyError, match="colon"):
        tokenize(llama.tokenizer, "no template", "x")


def edits_of(subject):
    draw = torch.Generator().manual_seed(1)
    left = torch.randn(subject.hidden_size, 1, generator=draw).to(subject.device)
    right = torch.randn(1, subject.inner_size, generator=draw).to(subject.device)
    return [
        LowRankUpdate(0, "test", factors={1: (left * 0.5, right)}),
        LowRankUpdate(1, "test", factors={2: (-left, right)}),
    ]


def test_greedy_texts_equal_model_generate(subject, cases):
    edits = edits_of(subject)
    requests = [Request(case.prompt, 4 + 5 * n, n % 3 - 1) for n, case in enumerate(cases)]
    requests += [Request(case.prompt, 16, -1) for case in cases]
    got = generate(subject, requests, edits, max_rows=4)
    for request, answer in zip(requests, got):
        ids = subject.tokenizer(request.prompt, add_special_tokens=False, return_tensors="pt").to(subject.device)
        with subject.applying(edits, rows=[request.edit]):
            out = subject.model.generate(**ids, max_new_tokens=request.budget)[0, ids.input_ids.shape[1] :]
        assert answer.text == subject.tokenizer.decode(out, skip_special_tokens=False)


def test_eos_ends_a_text_and_stays_in_it(llama):
    """With EOS made certain after the first token, every row is cut there whatever its budget."""
    eos = llama.tokenizer.eos_token_id
    hook = llama.model.lm_head.register_forward_hook(
        lambda _m, _a, out: out.index_fill(-1, torch.tensor([eos], device=out.device), 1e4)
    )
    try:
        texts = generate(llama, [Request("Intent: a\nCode:", 5), Request("Intent: bb\nCode:", 9)])
    finally:
        hook.remove()
    assert [answer.text for answer in texts] == ["<eos>", "<eos>"]


def test_sampling_does_not_depend_on_the_batch(llama, cases):
    noise = {case.case_id: gumbel(2, generator(42, "s", case.case_id)) for case in cases}
    requests = [Request(case.prompt, 64, -1, noise[case.case_id][0]) for case in cases]
    requests += [Request(case.prompt, 7) for case in cases]
    together = generate(llama, requests)
    alone = [generate(llama, [request])[0] for request in requests]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert together[0].text != together[5].text


def test_gumbel_noise_samples_the_top_five():
    """Maximum of logits plus noise follows the softmax over the top five (chi-square bound, fixed seed)."""
    from clme_lib.evaluation.generation import _sample

    logits = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0, -1.0, -9.0])
    noise = gumbel(300, torch.Generator().manual_seed(0)).reshape(-1, 5)
    counts = torch.bincount(_sample(logits.expand(len(noise), -1), noise), minlength=7).double()
    expected = torch.softmax(logits[:5].double(), 0) * len(noise)
    assert counts[5:].sum() == 0
    assert ((counts[:5] - expected) ** 2 / expected).sum() < 18.5  # 0.1% point of chi-square with 4 degrees


def test_seeds():
    # printf '42|smollm2-135m|cnle|grace|7' | sha256sum, first 16 hexadecimal digits
    assert seed_of(42, "smollm2-135m", "cnle", "grace", 7) == 0x8F14ED68AAABF0C0
    ids = list(range(50))
    order = seeded_order(ids, "sample", 1)
    assert sorted(order) == ids and order != ids
    assert seeded_order(ids[:-1], "sample", 1) == [token for token in order if token != 49]
