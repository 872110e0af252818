"""Measurements, floors, shape-only subjects, and batches that fit the memory."""

import json

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from clme_lib import cli
from clme_lib.editors.base import EDITORS
from clme_lib.editors.operations import Phase, Sizes
from clme_lib.editors.registry import load_editor, resolve_hparams
from clme_lib.evaluation.evaluate import Circumstances, requests_of, score, write
from clme_lib.forward.tokens import tokenize
from clme_lib.study import config as study_config
from clme_lib.study import runs
from clme_lib.study.config import BenchConfig
from clme_lib.study.paper import PAPER_VARIANTS
from clme_lib.study.rq2 import measure
from clme_lib.study.rq2 import random_weights as shapes
from clme_lib.study.rq2 import tables as rq2
from clme_lib.study.rq2.floor import Ceilings
from clme_lib.study.tables import editor_name
from clme_lib.subjects.settings import Shape, SubjectSettings, list_subjects, load_settings
from clme_lib.support import memory
from clme_lib.support.batching import Batches
from clme_lib.support.errors import StudyError
from clme_lib.support.seeds import DEFAULT_SEED

PAPER = ("codellama-7b", "codeqwen1.5-7b", "stablecode-3b")
# layers and sizes of the paper's values for four blocks, and few steps
SMALL = {
    "ft-l": {"layer": 2, "steps": 5},
    "rome": {"layer": 1, "steps": 5},
    "memit": {"layers": [0, 1], "steps": 5},
    "pmet": {"layers": [0, 1], "steps": 5},
    "alphaedit": {"layers": [0, 1]},
    "emmet": {"layers": [1]},
    "in-context-retrieved": {"layer": 1},
    "neuraldb": {"layer": 1},
    "ultraedit": {"layers": [2, 3]},
    "locft-bf": {"layer": 2},
    "malmen": {"layers": [2, 3], "rank": 8},
    **{name: {"layer": 2, "steps": 5} for name in ("grace", "a-grace", "a-grace-wo-cl", "a-grace-wo-mean")},
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_paper_subject(monkeypatch, five_neighbours):
    """StableCode's settings with a tiny shape, and five cases in each dataset."""
    settings = load_settings("stablecode-3b")
    shape = Shape(
        architecture="stablelm", hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=400, max_position_embeddings=512, partial_rotary_factor=0.25,
    )  # fmt: skip
    editors = {name: {**settings.editors.get(name, {}), **small} for name, small in SMALL.items()}
    small = SubjectSettings(subject=settings.subject.model_copy(update={"shape": shape}), editors=editors)
    monkeypatch.setattr(shapes, "load_settings", lambda name: small if name == "stablecode-3b" else load_settings(name))
    monkeypatch.setattr("clme_lib.editors.registry.load_settings", lambda name: small)
    for module in (shapes, measure):
        monkeypatch.setattr(module, "load_cases", lambda dataset: five_neighbours)


@pytest.fixture
def five_neighbours(cases):
    return cases


@pytest.mark.parametrize("name", PAPER)
def test_shapes_are_the_papers(name):
    """Parameter counts of the released checkpoints, from an empty model of the real class."""
    shape = load_settings(name).subject.shape
    config = shapes.AutoConfig.for_model(
        shape.architecture, **shape.model_dump(exclude={"architecture"}), tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = shapes.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    known = {"codellama-7b": 6_738_546_688, "codeqwen1.5-7b": 7_250_284_544, "stablecode-3b": 2_795_443_200}
    if name == "codellama-7b":  # 32,016 tokens; 6,738,415,616 with Llama 2's 32,000
        assert counted == 6_738_415_616 + 2 * 16 * 4096
    assert counted == known[name]
    assert shapes.parameters(shape) == pytest.approx(counted, rel=1e-3)


def test_a_shape_only_subject_is_seeded_and_edits(small_paper_subject, cases):
    drawn, again = (shapes.random_subject("stablecode-3b", "cpu") for _ in range(2))
    for parameter, same in zip(drawn.model.parameters(), again.model.parameters()):
        assert torch.equal(parameter, same)
    assert type(drawn.model).__name__ == "StableLmForCausalLM" and len(drawn.tokenizer) <= 400
    assert tokenize(drawn.tokenizer, cases[0].prompt, cases[0].target).lookup >= 0  # the prompt's colon is a token
    half = shapes.random_subject("stablecode-3b", "cpu", "bfloat16")
    assert half.dtype == torch.bfloat16


def test_a_device_that_is_too_small_is_refused(monkeypatch):
    monkeypatch.setattr(shapes, "free_memory_bytes", lambda device: 10 * 2**30)
    with pytest.raises(StudyError, match=r"codellama-7b in bfloat16 needs about 14.4 GiB, but cpu has 10.0 GiB free"):
        shapes.random_subject("codellama-7b", "cpu", "bfloat16")
    with pytest.raises(
        StudyError,
        match="'smollm2-135m' has no shape to fill with random weights; use one of codellama-7b",
    ):
        shapes.random_subject("smollm2-135m")
    with pytest.raises(StudyError, match="dtype='int8' is not one of auto, float32"):
        shapes.random_subject("codellama-7b", "cpu", "int8")


@pytest.mark.slow
def test_every_editor_is_measured_and_the_command_resumes(small_paper_subject, tmp_path, capsys):
    arguments = ["bench", "--subject", "stablecode-3b", "--random-weights", "--device", "cpu", "--cases", "2", "--batches", "1",
                 "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*arguments, "--editors", "grace,memit"]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    before = file.read_text()
    assert cli.main(arguments) == 0
    after = file.read_text()
    assert file.name == "stablecode-3b-random.jsonl" and after.startswith(before)
    assert cli.main(arguments) == 0 and file.read_text() == after
    measured = measure.load_measurements(tmp_path)
    assert measured["kind"].value_counts().to_dict() == {"edit": 36, "throughput": 18, "setup": 18, "ceiling": 1}
    edits = measured[measured["kind"] == "edit"]
    assert (edits["seconds"] > 0).all() and (edits["peak_mib"] >= edits["base_mib"] * 0.9).all()
    # nothing stops early with random weights
    steps = edits.groupby("editor")["steps"].unique().map(list).to_dict()
    for name, made in steps.items():
        assert made == [resolve_hparams(name, "stablecode-3b").model_dump().get("steps", 1)], name
    assert "seconds" in capsys.readouterr().out
    for table in (
        rq2.circumstances,
        rq2.cost_table,
        rq2.throughput_table,
        rq2.floor_table,
        rq2.ceiling_table,
        rq2.projection_table,
    ):
        shown = table(measured, label="tab")
        assert len(shown.data) and "nan" not in shown.to_myst() and shown.label == "tab", table
    costs, floors = (table(measured, label="tab").data for table in (rq2.cost_table, rq2.floor_table))
    assert (
        list(costs["Subject"].unique())
        == list(floors["Subject"].unique())
        == ["stablecode-3b (random weights, float32)"]
    )
    assert len(costs) == len(floors) == 9 and set(costs["n"]) == {"2"}
    middle = edits.groupby(["editor", "dataset"])["seconds"].median()
    for name, shown in zip(PAPER_VARIANTS, costs["CSNE s / edit"]):
        assert float(shown.split("<br>")[0]) == pytest.approx(middle[name, "csne"], abs=0.006)
    counted = rq2.findings(measured)
    fastest = middle.unstack("dataset")["cnle"].idxmin()
    cheapest = counted["costs"].loc["stablecode-3b (random weights, float32)", "CNLE"]
    assert (cheapest["least"], cheapest["fastest"]) == (middle[fastest, "cnle"], editor_name(fastest))
    longer = (middle.unstack("dataset")["csne"] > middle.unstack("dataset")["cnle"]).sum()
    assert counted["csne_longer"] == {"pairs": 9, "longer": longer} and counted["on_gpu"] is False
    assert counted["half"] is None and counted["shapes"] is None and not counted["too_large"]
    projection = rq2.projection_table(measured, label="tab").data.set_index("Subject")
    assert projection.loc["codellama-7b", "Machine"] == "not measured"
    rates = measured[(measured["kind"] == "throughput") & (measured["batch"] == 1)]
    alone = sum(
        (rate["edit_seconds"] + rate["evaluate_seconds"]) * rq2.PAPER_CASES[rate["dataset"]]
        for _, rate in rates.iterrows()
    )
    assert float(projection.loc["stablecode-3b", "one case at a time (h)"]) == pytest.approx(alone / 3600, abs=0.5)
    # ten seconds a case by the plain procedure, whatever the editor; twenty with values that are not the subject's own
    places = [
        (data, name) for data in ("cnle", "csne") for name in ("ft-l", "rome", "memit", "pmet", "malmen", "grace")
    ]
    plain = pd.DataFrame(
        {"editor": name, "data": data, "values": values, "plain s/case": seconds, "device": "any", "threads": 2}
        for data, name in places
        for values, seconds in (("transferred", 20.0), ("subject", 10.0))
    )
    embedded = measured.assign(subject="smollm2-135m", machine="any", threads=2)
    beside = rq2.projection_table(embedded, plain, label="tab").data.set_index("Subject").loc["smollm2-135m"]
    assert float(beside["plain procedure (h)"]) == pytest.approx(10 * 9 * 37_055 / 3600, abs=0.5)
    assert "plain procedure (h)" not in rq2.projection_table(embedded, plain.iloc[4:], label="tab").data
    assert "plain procedure (h)" not in rq2.projection_table(embedded.assign(threads=3), plain, label="tab").data
    assert counted["unmeasured"] == ["codellama-7b", "codeqwen1.5-7b", "smollm2-135m"]
    assert len(rq2.cost_figure(measured).axes) == 2


@pytest.mark.slow
def test_a_batch_that_does_not_fit_ends_the_growth(small_paper_subject, monkeypatch, tmp_path):
    edit = EDITORS["grace"].edit

    def small_device(self, cases, batch_size=None, progress=False):
        if len(cases) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return edit(self, cases, batch_size, progress)

    monkeypatch.setattr(EDITORS["grace"], "edit", small_device)
    config = study_config.make_config(BenchConfig, subject="stablecode-3b", random_weights=True, dataset="cnle", editors="grace", cases=1,
                                       batches="2,4,8", out=tmp_path, device="cpu")  # fmt: skip
    measured = measure.bench(config)
    batches = measured[measured["kind"] == "throughput"].set_index("batch")["error"]
    assert list(batches.index) == [2, 4] and batches[4] == "out of memory"
    assert "out of memory" in rq2.throughput_table(measured, label="tab").to_myst()


@pytest.mark.slow
def test_an_editor_that_does_not_fit_is_said_so(small_paper_subject, monkeypatch, tmp_path):
    def full(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1445068800 bytes")

    monkeypatch.setattr(EDITORS["memit"], "setup", full)
    config = study_config.make_config(BenchConfig, subject="stablecode-3b", random_weights=True, editors="memit,grace", cases=1, batches="",
                                       out=tmp_path, device="cpu")  # fmt: skip
    measured = measure.bench(config)
    shown = rq2.cost_table(measured, label="tab")
    costs = shown.data.set_index("Editor")
    assert costs.loc["MEMIT", "CNLE s / edit"] == costs.loc["MEMIT", "CSNE s / edit"] == "out of memory"
    assert costs.loc["MEMIT", "n"] == "0" and float(costs.loc["GRACE", "CNLE s / edit"]) > 0
    assert list(rq2.findings(measured)["too_large"].values()) == [["MEMIT"]]
    assert "nan" not in shown.to_myst() and len(rq2.floor_table(measured, label="tab").data) == 1
    assert len(rq2.cost_figure(measured).axes) == 2


def test_text_before_prompts_costs_its_tokens(small_paper_subject, tmp_path, cases):
    """Making such an edit takes no time, so it is no fastest editor; what is read each time afterwards is in the table."""
    config = study_config.make_config(BenchConfig, subject="stablecode-3b", random_weights=True, dataset="cnle", editors="in-context,grace",
                                       cases=2, batches="", out=tmp_path, device="cpu")  # fmt: skip
    measured = measure.bench(config)
    tokenizer = shapes.random_subject("stablecode-3b", "cpu").tokenizer
    by_case = {case.case_id: len(tokenizer(f"{case.prompt} {case.target}\n\n")["input_ids"]) for case in cases}
    edits = measured[measured["kind"] == "edit"].set_index(["editor", "case_id"])["added_tokens"]
    assert (
        edits["in-context"].to_dict() == {case: by_case[case] for case in edits["in-context"].index} and len(edits) == 4
    )
    assert not edits["grace"].any()
    shown = rq2.cost_table(measured, label="tab").data.set_index("Editor")["CNLE prompt tokens added"]
    assert shown["GRACE"] == "0" and float(shown["in context"]) == pytest.approx(edits["in-context"].median(), abs=0.5)
    (cost,) = rq2.findings(measured)["costs"].to_dict("records")
    assert cost["fastest"] == cost["slowest"] == "GRACE"
    assert (
        "CNLE prompt tokens added" not in rq2.cost_table(measured[measured["editor"] != "in-context"], label="tab").data
    )


def test_the_papers_orderings_are_counted_where_all_of_them_were_measured():
    """The second subject has no MEMIT and PMET: it counts for no order of theirs, and its other editors are compared alone."""
    place = {
        "random_weights": True,
        "dtype": "bfloat16",
        "machine": "any",
        "device": "cpu",
        "threads": 2,
        "kind": "edit",
    }
    seconds = {"one": {"malmen": 1, "grace": 5, "memit": 90, "pmet": 100}, "two": {"malmen": 2, "grace": 6}}
    measured = pd.DataFrame(
        {
            **place,
            "subject": name,
            "dataset": "cnle",
            "editor": editor,
            "seconds": float(value),
            "peak_mib": 10.0 * value,
        }
        for name, of_subject in seconds.items()
        for editor, value in of_subject.items()
    )
    counted = rq2.findings(measured)
    assert counted["malmen"] == {"pairs": 1, "fastest": 1, "slowest": 1} and counted["csne_longer"] is None
    assert counted["shapes"] == {"seconds": "two", "peak_mib": "two"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"editors": "none"}, "editors: .*'none' makes no edit that could be timed"),
        ({"batches": "0,2"}, "batches: .*a batch holds 1 to 65536 cases"),
        ({"dataset": "conala"}, "unknown dataset 'conala'; known: cnle, csne"),
        ({"casess": 3}, "casess: unknown key .*known: subject, random_weights"),
    ],
)
def test_wrong_configurations_are_refused(values, message):
    with pytest.raises(StudyError, match=message):
        study_config.make_config(BenchConfig, **values)


def test_finished_measurements_are_shown_and_missing_ones_named(tmp_path):
    row = {"kind": "edit", "subject": "any", "editor": "grace"}
    (tmp_path / "any.jsonl").write_text(json.dumps(row) + "\n")
    shown = measure.bench(study_config.make_config(BenchConfig, show=tmp_path, out=tmp_path / "other"))
    assert shown.to_dict("records") == [row] and not (tmp_path / "other").exists()
    with pytest.raises(StudyError, match="no measurements; expected .*which `clme bench"):
        measure.load_measurements(tmp_path / "other")


class Products(TorchDispatchMode):
    """Operations of all matrix products, forward and backward, as PyTorch counts them."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if name != "pmet"])
def test_floors_count_what_is_computed(subject, cases, name, monkeypatch):
    """Counted by formula and by PyTorch: the floor leaves out what could be saved, and little else."""
    monkeypatch.setattr(
        measure,
        "load_editor",
        lambda editor_name, subject, **named: load_editor(
            editor_name,
            subject,
            **{
                **named,
                **SMALL[editor_name],
                **dict.fromkeys({"steps", "passes"} & set(EDITORS[name].Hyperparameters.model_fields), 9),
            },
        ),
    )
    editor = measure.ready(subject, name, cases, random_weights=True)
    editor.edit(cases[:1])  # what is made once
    tokens = tokenize(subject.tokenizer, cases[0].prompt, cases[0].target)
    with Products() as counted:
        (edit,) = editor.edit(cases[:1])
    estimate = editor.operations(len(tokens.prompt_ids), len(tokens.target_ids), len(edit.log.losses))
    ratio = counted.operations / sum(part.operations for part in estimate)
    assert 0.9 < ratio < 2, ratio


# a codebook is asked at every token of the texts that it leaves alone, which are read for that
@pytest.mark.slow
@pytest.mark.parametrize("name, most", [("rome", 1.5), ("in-context", 1.5), ("grace", 4)])
def test_the_floor_of_an_evaluation_counts_what_is_computed(subject, cases, name, most):
    hparams = {"rome": {"layer": 1, "steps": 2}, "grace": {"layer": 2, "steps": 2}}.get(name, {})
    cases = cases[:2]
    edits = load_editor(name, subject, **hparams).edit(cases)
    circumstances = Circumstances(name, metrics=None)
    requests = requests_of(subject, cases, edits, circumstances)
    write(subject, requests, edits)  # texts that no edit changes are kept
    # PyTorch counts nothing of the CPU's own kernel of attention
    with sdpa_kernel(SDPBackend.MATH), Products() as counted:
        texts = write(subject, requests, edits)
    read, written = measure.phases_of_evaluation(subject, requests, texts, edits)
    assert 0.9 < counted.operations / (read.operations + written.operations) < most
    sizes = Sizes(subject)
    longest = max(len(text.ids) for text in texts)
    assert written.traffic > (longest - 1) * (sizes.blocks * sizes.block + sizes.head) * 4
    assert [record.texts for record in score(subject, cases, edits, circumstances)]


def test_what_is_written_is_counted_by_hand(llama):
    sizes = Sizes(llama)
    whole = 4 * sizes.block + sizes.head
    phase = sizes.write([(5, 1), (5, 3)])  # the prompts' pass gives both first tokens; the second text needs two more
    assert phase.operations == 2 * 2 * whole + 4 * 4 * 32 * (6 + 7)
    assert phase.traffic == 4 * (
        2 * whole + 2 * 4 * 16 * (6 + 7)
    )  # keys and values of two heads of eight, in four blocks
    assert sizes.write([]).traffic == sizes.read_prompts([]).traffic == 0
    prompts = sizes.read_prompts([3, 5])
    assert prompts.operations == sum(sizes.read(length, 4).operations for length in (3, 5)) + 2 * 2 * sizes.head
    assert prompts.traffic == 4 * whole


def test_the_floor_of_a_batch_reads_weights_once(llama, cases):
    editor = load_editor("grace", llama, layer=2, steps=3)
    edits = editor.edit(cases[:2])
    alone = [measure.phases_of_edits(editor, [case], [edit]) for case, edit in zip(cases, edits)]
    together = measure.phases_of_edits(editor, cases[:2], edits)
    for first, second, both in zip(*alone, together):
        assert first.name == second.name == both.name
        assert both.operations == first.operations + second.operations
        assert both.traffic == max(first.traffic, second.traffic)


def test_whole_cases_are_shown_beside_their_floor():
    place = {
        "subject": "smollm2-135m",
        "random_weights": False,
        "dtype": "float32",
        "device": "cpu",
        "machine": "m",
        "threads": 2,
    }
    batch = {**place, "kind": "throughput", "dataset": "cnle", "editor": "grace", "batch": 4, "edit_seconds": 6.0, "evaluate_seconds": 2.0,
             "error": None, "phases": [["steps", 300.0, 1.0], ["write", 100.0, 20.0]]}  # fmt: skip
    batch["measured"] = "2026-11-02"
    ceiling = {
        **place,
        "kind": "ceiling",
        "operations_per_second": 100.0,
        "bytes_per_second": 10.0,
        "measured": "2026-11-01",
    }
    other = {**ceiling, "operations_per_second": 1.0, "threads": 1}
    earlier = {**batch, "batch": 1, "phases": float("nan")}
    (shown,) = rq2.whole_case_floor_table(pd.DataFrame([other, ceiling, batch, earlier]), label="tab").data.to_dict(
        "records"
    )
    # 3 s of steps by arithmetic, 2 s of writing by traffic
    assert (shown["measured s / case"], shown["of it evaluation"], shown["floor s / case"]) == ("2.00", "0.50", "1.25")
    assert (shown["floor / measured (%)"], shown["Batch"], shown["longest phase"]) == ("62", "4", "steps")


def test_the_floor_is_the_longer_of_arithmetic_and_traffic():
    device = Ceilings(operations=100.0, traffic=10.0)
    assert device.seconds([Phase("a", 200, 10), Phase("b", 100, 50)]) == 2 + 5


def batches_of(monkeypatch, used, free, size="auto", device="cpu"):
    """Sizes of the batches of 64 cases where each takes ``used`` MiB and ``free`` are left."""
    state = {"batch": 0}
    monkeypatch.setattr("clme_lib.support.batching.reset_peak_memory", lambda device: None)
    monkeypatch.setattr("clme_lib.support.batching.memory_in_use_mib", lambda device: 100.0)
    monkeypatch.setattr("clme_lib.support.batching.peak_memory_mib", lambda device: 100.0 + used * state["batch"])
    monkeypatch.setattr(
        "clme_lib.support.batching.free_memory_bytes", lambda device: (free - used * state["batch"]) * 2**20
    )
    sizes = []
    for batch in Batches(list(range(64)), size, torch.device(device)):
        state["batch"] = len(batch)
        sizes.append(len(batch))
    return sizes


def test_batches_grow_while_memory_is_left(monkeypatch):
    assert batches_of(monkeypatch, used=1, free=10_000) == [8, 16, 16, 16, 8]
    assert batches_of(monkeypatch, used=1, free=10_000, device="cuda") == [8, 16, 32, 8]
    assert batches_of(monkeypatch, used=10, free=100) == [8] * 8
    assert batches_of(monkeypatch, used=10, free=100, size=20) == [20, 20, 20, 4]


def test_a_run_goes_on_in_smaller_batches(tiny, source, monkeypatch, tmp_path):
    edit, tried = EDITORS["grace"].edit, []

    def small_device(self, cases, batch_size=None, progress=False):
        tried.append(len(cases))
        if len(cases) > 2 or cases[0].case_id == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return edit(self, cases, batch_size, progress)

    monkeypatch.setattr(EDITORS["grace"], "edit", small_device)
    config = study_config.make_config(subject="tiny-llama", dataset="cnle", editors="grace", cases=5, source=str(source), batch_size="auto",
                              values="transferred", out=tmp_path / "run")  # fmt: skip
    records = runs.run(config)
    assert sorted(records["case_id"]) == list(range(5)) and max(tried) == 5
    failed = records[records["error"].notna()]
    assert list(failed["case_id"]) == [3] and "does not fit" in failed["error"].iloc[0]
    with pytest.raises(StudyError, match="batch_size: .*from 1 to 65536, or auto"):
        study_config.make_config(batch_size="many")


def test_free_memory_is_told():
    assert 2**20 < memory.free_memory_bytes(torch.device("cpu")) < 2**50
    assert memory.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert memory.is_out_of_memory(RuntimeError("unable to mmap 538090408 bytes: Cannot allocate memory (12)"))
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))


def test_all_registered_paper_subjects_have_shapes():
    assert {name for name in list_subjects() if load_settings(name).subject.shape} == set(PAPER)
    assert measure.BenchConfig().seed == DEFAULT_SEED and isinstance(pd.DataFrame(), pd.DataFrame)
