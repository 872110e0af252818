"""Free texts and their scores: what is cut where, what counts as the same, and that the paper's texts are their beginnings."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clme_lib.datasets.base import get_dataset
from clme_lib.datasets.cases import Case
from clme_lib.datasets.embedded_cnle import read_rows
from clme_lib.datasets.paper import CNLE, CSNE
from clme_lib.editors.registry import load_editor
from clme_lib.evaluation.evaluate import Circumstances, score
from clme_lib.evaluation.generation import FLUENCY_TOKENS, Request, generate
from clme_lib.evaluation.records import Record, evaluated
from clme_lib.forward.tokens import token_budget
from clme_lib.metrics.base import FREE_TEXTS, Evaluated, scores_of
from clme_lib.metrics.free import FREE_METRICS, FREE_TOKENS, first_statement

TARGETS = [row["snippet"] for row in read_rows("cnle-targets")]


@pytest.mark.parametrize(
    "code, statement",
    [
        ("x = 1\ny = 2", "x = 1"),
        ("", ""),
        ("\nx = 1", ""),
        ("f(1,\n  2)\ng()", "f(1,\n  2)"),
        ("d = {'a': [1,\n2]}\n", "d = {'a': [1,\n2]}"),
        ("s = '(\nx", "s = '("),  # A string that is never closed ends with its line.
        ("s = 'it\\'s ('\nx", "s = 'it\\'s ('"),
        ("s = '''a\nb'''\nx", "s = '''a\nb'''"),
        ('s = """a\nb', 's = """a\nb'),
        ("x = 1  # ([\ny", "x = 1  # (["),
        ("x = 1 + \\\n 2\ny", "x = 1 + \\\n 2"),
        ("for x in xs:\n    print(x)\n\tf()\nend", "for x in xs:\n    print(x)\n\tf()"),
        ("x)]\ny", "x)]"),
        ("x = 1\n   \ny", "x = 1"),
    ],
)
def test_a_statement_ends_at_the_first_line_break_that_is_its_own(code, statement):
    assert first_statement(code) == statement


@given(st.text(alphabet="ab\n'\"\\#([{)]} \t=", max_size=60), st.sampled_from(TARGETS))
def test_what_follows_a_statement_never_matters(rest, target):
    assert first_statement(rest) == rest[: len(first_statement(rest))]
    if first_statement(target) == target:
        assert first_statement(f"{target}\nx{rest}") == target


def test_nearly_all_targets_are_one_statement():
    assert sum(first_statement(target) == target for target in TARGETS) >= 0.99 * len(TARGETS)


def of(
    dataset, target="xs.sort()", free=("xs.sort()",), rephrased=(), kept=("a",), answers=("a",), **more
) -> Evaluated:
    case = Case(1, dataset.name, dataset.prompt("x"), target, ("r",) * len(rephrased), ("u",) * len(kept))
    texts = {
        "effectiveness": ["e"], "generalization": list(rephrased), "specificity": list(kept), "fluency": ["f"],
        **dict(zip(FREE_TEXTS, (list(free), list(rephrased)))),
    }  # fmt: skip
    return Evaluated(case, texts, list(answers), dataset.code, **more)


@pytest.mark.parametrize(
    "text, same_text, same_code, parses",
    [
        (" d['a']", 1, 1, 1),
        (" d['a']\nprint(d)", 1, 1, 1),
        (' d["a"]', 0, 1, 1),
        (" d [ 'a' ]  # the entry", 0, 1, 1),
        (" d['a'", 0, 0, 0),
        (" d['b']", 0, 0, 1),
        ("\n```python\nd['a']", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_code_is_compared_as_text_and_as_code(text, same_text, same_code, parses):
    scores = scores_of(of(CNLE, "d['a']", [text], [text]), FREE_METRICS)
    for measure in FREE_TEXTS:
        assert (scores[f"{measure}_em"], scores[f"{measure}_code"]) == (same_text, same_code)
        assert scores[f"{measure}_chrf"] is None
    assert scores["parses"] == parses


def test_a_description_ends_with_its_line_and_has_no_syntax():
    scores = scores_of(of(CSNE, "Sort a list.", [" Sort a list.\nMore"], [" Sort the list."]), FREE_METRICS)
    assert (scores["free_effectiveness_em"], scores["free_generalization_em"]) == (1, 0)
    assert scores["free_effectiveness_chrf"] == 1 > scores["free_generalization_chrf"] > 0.3
    assert scores["free_effectiveness_code"] is scores["parses"] is None


def test_a_target_of_several_statements_is_not_judged():
    scores = scores_of(of(CNLE, "x = 1\ny = 2", ["x = 1\ny = 2"]), FREE_METRICS)
    assert scores["free_effectiveness_em"] is scores["free_effectiveness_code"] is None


def test_stopping_and_what_follows_the_target():
    ended = scores_of(of(CNLE, free=["xs.sort() or xs"], free_tokens=[7], target_tokens=4), FREE_METRICS)
    assert (ended["stops"], ended["overrun"]) == (1, 3)
    running = scores_of(of(CNLE, free=["xs"], free_tokens=[FREE_TOKENS], target_tokens=4), FREE_METRICS)
    assert (running["stops"], running["overrun"]) == (0, None)
    older = scores_of(of(CNLE, free=[]), FREE_METRICS)
    assert older["stops"] is older["overrun"] is older["free_effectiveness_em"] is None


@pytest.mark.parametrize(
    "edited, plain, kept",
    [
        ("```python\nprint(a", "print(a)\nprint", 1),
        ("```python\nprint(a", "```py\nprint(a", 1),
        ("```python\nprint(b", "print(a)", 0),
        ("print(a)", "print(a)", 1),
        ("```python\n", "print(a)", 0),
    ],
)
def test_a_fence_alone_is_no_change(edited, plain, kept):
    assert scores_of(of(CNLE, kept=[edited], answers=[plain]), ["kept_without_fence"]) == {"kept_without_fence": kept}


def test_neighbours_that_get_the_edits_own_answer_are_counted():
    kept = [" xs.sort()\nxs", " xs.s", "ys", " xs.sort()"]
    answers = ["ys", "ys", "ys", "xs.sort()"]  # The last one was answered so before.
    assert scores_of(of(CNLE, kept=kept, answers=answers), ["answer_in_neighbours"]) == {"answer_in_neighbours": 0.5}


def test_what_a_codebook_writes_is_taken_apart():
    texts = [" xs.sort()", "ys", " xs.sort()"]
    case = of(CNLE, rephrased=texts, fired=[True, True, True, False, False])
    scores = scores_of(case, FREE_METRICS)
    assert scores["fires"] == pytest.approx(2 / 3) and scores["right_where_fired"] == 0.5
    never = scores_of(of(CNLE, rephrased=texts, fired=[True, False, False, False, False]), FREE_METRICS)
    assert never["fires"] == 0 and never["right_where_fired"] is None
    assert scores_of(of(CNLE, rephrased=texts), FREE_METRICS)["fires"] is None


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["clean", "compat"])
def test_the_papers_texts_are_the_beginnings_of_the_free_ones(subject, cases, preset):
    cases = cases[:2]
    edits = load_editor("grace", subject, layer=2).edit(cases)
    records = score(subject, cases, edits, Circumstances("grace", preset=preset))
    for n, (case, record) in enumerate(zip(cases, records)):
        budget = token_budget(subject.tokenizer, case.prompt, case.target, preset)
        prompts = [case.prompt, *case.rephrased]
        alone = generate(subject, [Request(prompt, budget, n) for prompt in prompts], edits)
        assert record.texts["effectiveness"] + record.texts["generalization"] == [text.text for text in alone]
        free = generate(subject, [Request(prompt, FREE_TOKENS, n) for prompt in prompts], edits)
        eos = subject.tokenizer.eos_token
        kept = [record.texts[name][0] for name in FREE_TEXTS]
        assert kept == [text.text.removesuffix(eos) for text in free]
        assert record.free_tokens == [len(text.ids) - text.text.endswith(eos) for text in free]
    assert FREE_TOKENS == FLUENCY_TOKENS  # no position is needed that was not needed before


def test_scores_are_computed_again_from_a_record(llama, cases):
    edits = load_editor("grace", llama, layer=2).edit(cases)
    for case, record in zip(cases, score(llama, cases, edits, Circumstances("grace"))):
        read = Record.model_validate_json(record.model_dump_json())
        assert scores_of(evaluated(read, case, read.answers), FREE_METRICS) == {
            name: record.scores[name] for name in FREE_METRICS
        }


LEARNING = {
    "ft-l": {"layer": 2, "steps": 5},
    "rome": {"layer": 2, "steps": 5},
    "memit": {"layers": [1, 2], "steps": 5},
    "pmet": {"layers": [1, 2], "steps": 5},
    "grace": {"layer": 2, "steps": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_an_end_of_text_is_learnt_as_if_it_were_the_targets_last_token(subject, cases, name):
    case, eos = cases[2], subject.tokenizer.eos_token
    ended = replace(case, target=case.target + eos)
    assert subject.tokenizer(ended.target)["input_ids"][-1] == subject.tokenizer.eos_token_id
    (learnt,) = load_editor(name, subject, end_of_target=True, **LEARNING[name]).edit([case])
    (expected,) = load_editor(name, subject, **LEARNING[name]).edit([ended])
    (without,) = load_editor(name, subject, **LEARNING[name]).edit([case])
    assert learnt.log.losses == expected.log.losses
    if name == "grace":  # A memory knows its targets by their texts, which differ here.
        learnt, expected, without = (replace(edit, targets=None) for edit in (learnt, expected, without))
    assert learnt.sha256 == expected.sha256 != without.sha256


def test_only_the_end_of_text_differs_where_a_target_is_read_alone(llama, cases):
    from clme_lib.editors.locate_then_edit.learning import rewriting_rows
    from clme_lib.editors.malmen.gradients import edit_row

    eos = llama.tokenizer.eos_token_id
    plain, ended = (edit_row(llama, cases[0].prompt, cases[0].target, "alone", end) for end in (False, True))
    assert ended.target_ids == (*plain.target_ids, eos) and len(ended.inputs) == len(plain.inputs) + 1
    plain, ended = (rewriting_rows(llama, cases[0], [""], "aligned", "alone", end)[0] for end in (False, True))
    assert ended.target_ids == (*plain.target_ids, eos)
    assert len(ended.inputs) - ended.first_label == len(ended.target_ids)


def test_code_of_a_dataset_is_known_to_its_metrics():
    assert get_dataset("cnle").code == {"target"} and "target" not in get_dataset("csne").code
