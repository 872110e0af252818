"""Texts that an edit cannot change are the unedited subject's, found without generating them."""

import pytest
import torch

from clme_lib.editors.registry import load_editor
from clme_lib.edits.base import Edit
from clme_lib.edits.codebooks import Codebook, PromptCodebook
from clme_lib.evaluation import unedited
from clme_lib.evaluation.evaluate import evaluate
from clme_lib.evaluation.generation import Request, generate, gumbel
from clme_lib.forward.blockwise import Blockwise
from clme_lib.forward.prompt_keys import prompt_queries
from clme_lib.forward.tokens import encode
from clme_lib.support.seeds import generator

LAYER = 2


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


def requests_of(cases):
    """Greedy and sampled texts of every case's prompts, each under the case's own edit."""
    prompts = [
        (n, prompt) for n, case in enumerate(cases) for prompt in (case.prompt, *case.rephrased, *case.unrelated)
    ]
    noise = gumbel(len(prompts), generator(0, "noise"))
    return [
        Request(prompt, budget, n, noise[k] if budget == 9 else None)
        for k, (n, prompt) in enumerate(prompts)
        for budget in (6, 9)
    ]


@pytest.mark.parametrize("query", ["mean", "last", None])
def test_they_are_what_generation_gives(subject, cases, query):
    kind = query or "last"
    keys = prompt_queries(subject, [case.prompt for case in cases], LAYER)[kind]
    others = prompt_queries(subject, [prompt for case in cases for prompt in case.unrelated], LAYER)[kind]
    # some fire, some do not; one that is asked at every token has many chances to
    distances = torch.cdist(keys, others).flatten().sort().values
    place = int((0.5 if query else 0.3) * len(distances))
    # in the widest gap nearby: rounding decides nothing
    gaps = distances[place - 4 : place + 5].diff()
    radius = distances[place - 4 + gaps.argmax()] + gaps.max() / 2
    values = torch.randn(len(cases), subject.hidden_size, generator=torch.Generator().manual_seed(1)).to(subject.device)
    options = {"query": query} if query else {}
    edits = [
        (PromptCodebook if query else Codebook)(
            case.case_id,
            "any",
            layer=LAYER,
            keys=keys[n : n + 1],
            values=10 * values[n : n + 1],
            radii=radius[None],
            **options,
        )
        for n, case in enumerate(cases)
    ]
    requests = requests_of(cases)
    generated = generate(subject, requests, edits)
    still = unedited.unchanged(subject, requests, edits)
    assert 5 < len(still) < len(requests) - 5
    for n, output in still.items():
        assert (output.text, output.ids, output.fired) == (generated[n].text, generated[n].ids, False)
        assert output.distance == pytest.approx(generated[n].distance, rel=1e-4)
    fires_at_once = {n for n, output in enumerate(generated) if output.fired}
    assert fires_at_once.isdisjoint(still)
    if query:  # asked with the prompt alone: the others cannot change
        assert fires_at_once | set(still) == set(range(len(requests)))


def test_a_codebook_that_fires_at_a_written_token_changes_the_text(llama, cases):
    request = Request(cases[0].prompt, 8, 0)
    (plain,) = generate(llama, [Request(cases[0].prompt, 8)])
    walk = Blockwise(llama, [encode(llama.tokenizer, cases[0].prompt) + list(plain.ids)])

    def book(column, layer=LAYER):
        key = walk.block(layer, walk.up_to(layer)).keys[0, column][None]
        return Codebook(
            0, "grace", layer=layer, keys=key, values=torch.ones(1, llama.hidden_size), radii=torch.tensor([1e-3])
        )

    # the last token written is never read, all before it are
    assert list(unedited.unchanged(llama, [request], [book(-1)])) == [0]
    for column in (-2, -7):
        assert not unedited.unchanged(llama, [request], [book(column)])
    assert not unedited.unchanged(llama, [request], [book(-9)])  # the prompt's own
    assert not unedited.unchanged(llama, [request], [Edit.compose([book(-2), book(-3, LAYER + 1)])])


def test_each_is_generated_once(llama, cases, monkeypatch):
    made = []
    monkeypatch.setattr(
        unedited, "generate", lambda subject, requests: made.extend(requests) or generate(subject, requests)
    )
    editors = [load_editor(name, llama, layer=LAYER, steps=2, radius=1e-3) for name in ("grace", "a-grace-wo-cl")]
    records = [evaluate(llama, cases, editor.edit(cases)) for editor in editors]
    texts = [
        (request.prompt, request.budget, None if request.noise is None else request.noise.sum().item())
        for request in made
    ]
    assert len(set(texts)) == len(texts)
    # no rephrased prompt fires: one greedy and one sampled text of each, and the neighbours' answers
    neighbours = {prompt for case in cases for prompt in case.unrelated}
    assert len(texts) == 2 * len(cases) + len(neighbours)
    assert records[0]["specificity_em"].eq(1).all()
    assert records[0]["generated_generalization"].equals(records[1]["generated_generalization"])


def test_the_unedited_row_is_generated_anew(llama, cases, monkeypatch):
    edits = load_editor("none", llama).edit(cases)
    assert unedited.unchanged(llama, requests_of(cases), edits) == {}
