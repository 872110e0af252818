"""What edits made one after another do to each other: against products written out edit by edit."""

from dataclasses import replace
from itertools import permutations
from statistics import median

import pandas as pd
import pytest
import torch

from clme_lib.datasets import registry as datasets
from clme_lib.editors.base import EDITORS
from clme_lib.editors.registry import load_editor
from clme_lib.edits.base import Edit
from clme_lib.study import interference

SMALL = {
    "ft-l": {"layer": 2, "steps": 4},
    "rome": {"layer": 1, "steps": 4},
    "lora": {"steps": 3},
    "ultraedit": {"layers": [2, 3]},
    "grace": {"layer": 2, "steps": 4, "radius": 50.0},
}


@pytest.fixture(autouse=True)
def small(monkeypatch, cases, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))
    cases = [replace(case, target=target) for case, target in zip(cases, ("in", "or", "to"))]
    monkeypatch.setattr(datasets, "load_cases", lambda name: cases)
    monkeypatch.setattr(datasets, "selection_ids", lambda name: {case.case_id for case in cases})
    monkeypatch.setattr(
        interference, "load_editor", lambda name, subject: load_editor(name, subject, **SMALL.get(name, {}))
    )
    return cases


def lookup_key(subject, prompt, layer):
    """The input of a layer's ``down_proj`` at the prompt's last token, by a hook on the unedited model."""
    seen = []
    hook = subject.down_proj(layer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1]))
    with torch.no_grad():
        subject.model(**subject.tokenizer(prompt, return_tensors="pt"))
    hook.remove()
    return seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ft-l", "rome", "lora"])
def test_updates_equal_products_written_out(llama, small, tmp_path, name):
    table = interference.measure_interference(llama, tmp_path / "t.csv", [name]).set_index("edits")
    assert list(table.index) == [1, 3] and table["radius"].isna().all()
    assert pd.isna(table.loc[1, ["reach", "later"]]).all()
    edits, subject = [], llama
    for case in small:
        edits += load_editor(name, subject, **SMALL[name]).edit([case])
        subject = llama.edited(Edit.compose(edits))
    layers = edits[0].layers
    keys = {layer: [lookup_key(llama, case.prompt, layer) for case in small] for layer in layers}
    weights = {layer: llama.down_proj(layer).weight for layer in layers}
    deltas = [edit.deltas() for edit in edits]

    def at(layer, edit, prompt):
        return deltas[edit][layer] @ keys[layer][prompt]

    reach = [at(n, i, j).norm() / at(n, i, i).norm() for n in layers for i, j in permutations(range(3), 2)]
    # the median of an even number of values is the lower of the two in the middle, as PyTorch defines it
    assert table.loc[3, "reach"] == pytest.approx(float(torch.stack(reach).median()), rel=1e-3)
    later = [
        (sum(at(n, j, i) for j in range(i + 1, 3)).norm() / at(n, i, i).norm()).item() for n in layers for i in range(2)
    ]
    assert table.loc[3, "later"] == pytest.approx(float(torch.tensor(later).median()), rel=1e-3)
    lengths = torch.stack([key.square().sum() for of_layer in keys.values() for key in of_layer])
    assert table.loc[3, "key"] == pytest.approx(lengths.median().item(), rel=1e-3)
    whole = sum(weight.square().sum() for weight in weights.values())
    for count in (1, 3):
        summed = [sum(of_edit[n] for of_edit in deltas[:count]).square().sum() for n in layers]
        assert table.loc[count, "norm"] == pytest.approx((sum(summed) / whole).sqrt().item(), rel=1e-3)


def test_an_edit_that_adds_nothing_has_no_ratio(llama, small, tmp_path, monkeypatch):
    """Where a case's loss is low enough already, FT-L changes nothing."""
    make = interference._one_after_another

    def second_is_zero(*given):
        edits = make(*given)
        return [edits[0], replace(edits[1], delta=torch.zeros_like(edits[1].delta)), edits[2]]

    monkeypatch.setattr(interference, "_one_after_another", second_is_zero)
    table = interference.measure_interference(llama, tmp_path / "t.csv", ["ft-l"]).set_index("edits")
    assert table.loc[3, ["norm", "reach", "later", "key"]].notna().all()


def test_a_codebook_has_radii_only(llama, small, tmp_path):
    table = interference.measure_interference(llama, tmp_path / "t.csv", ["grace"]).set_index("edits")
    assert table[["norm", "reach", "later", "key"]].isna().all(axis=None)
    whole = Edit.compose(load_editor("grace", llama, **SMALL["grace"]).edit(small))
    assert table.loc[1, "radius"] == 1.0
    expected = median(sorted(whole.radii.tolist())) / 50.0
    assert table.loc[3, "radius"] == pytest.approx(expected, rel=1e-3) and expected < 1
    shown = interference.interference_table(table.reset_index(), label="tab").data
    assert list(shown["Radius"]) == ["1", f"{expected:.3g}"] and set(shown["Norm"]) == {"–"}


def test_an_interrupted_measurement_goes_on(llama, tmp_path, monkeypatch):
    edited, make = [], interference._one_after_another

    def stops(editor, cases, what):
        if editor.name == "ft-l":
            raise KeyboardInterrupt
        edited.append(editor.name)
        return make(editor, cases, what)

    whole = interference.measure_interference(llama, tmp_path / "whole.csv", ["grace", "ft-l"])
    monkeypatch.setattr(interference, "_one_after_another", stops)
    with pytest.raises(KeyboardInterrupt):
        interference.measure_interference(llama, tmp_path / "t.csv", ["grace", "ft-l"])
    assert edited == ["grace"] and not (tmp_path / "t.csv").exists()
    monkeypatch.setattr(
        interference, "_one_after_another", lambda editor, *of: edited.append(editor.name) or make(editor, *of)
    )
    resumed = interference.measure_interference(llama, tmp_path / "t.csv", ["grace", "ft-l"])
    assert edited == ["grace", "ft-l"] and list(tmp_path.glob("*.part")) == []
    pd.testing.assert_frame_equal(resumed, whole)


def test_a_trained_editor_learns_from_the_other_cases(llama, small, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "selection_ids", lambda name: {case.case_id for case in small[:2]})
    learnt = []
    fit = EDITORS["ultraedit"].fit
    monkeypatch.setattr(
        EDITORS["ultraedit"],
        "fit",
        lambda self, cases, edited: learnt.append([case.case_id for case in cases]) or fit(self, cases, edited),
    )
    table = interference.measure_interference(llama, tmp_path / "t.csv", ["ultraedit"])
    assert learnt == [[small[2].case_id]] and list(table["edits"]) == [1, 2] and (table["norm"] > 0).all()
