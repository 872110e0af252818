"""The published records of schema 2 are those of schema 1: written back in the old form, every file has the old bytes."""

import hashlib
import json
from pathlib import Path

import pytest

from clme_lib.evaluation.records import read_records
from clme_lib.metrics.base import TEXTS
from clme_lib.metrics.paper import PAPER_METRICS
from clme_lib.study.run_folder import load_manifest

RUNS = Path(__file__).resolve().parent.parent / "results" / "runs"
# of the files of schema 1, as they were published
SHA256 = {
    "smollm2-135m-compat/cnle.a-grace-wo-cl.jsonl": "73baa12e53e0afd3d6ed3ffca393a6f61bcd99af63319a290cf617931767da36",
    "smollm2-135m-compat/cnle.a-grace-wo-mean.jsonl": "121eed6c22d4cbc6e7e7d1b6dfb075f51592be9012a2476f87c0bedd71e67a94",
    "smollm2-135m-compat/cnle.a-grace.jsonl": "d966c4124277f35e243a1c8f93a1595432c5881ad7b7dab5c535cbd27464f184",
    "smollm2-135m-compat/cnle.grace.jsonl": "6e7c3bca67529a56f95f3c215801f7d914903962d3f37394104187b8ef9db97a",
    "smollm2-135m-compat/csne.a-grace-wo-cl.jsonl": "a5a0e8157a4351a3aa7e98609644e3cd10a7634fc8f49edf7e887f0c223da1a1",
    "smollm2-135m-compat/csne.a-grace-wo-mean.jsonl": "e2cb2d04f566fab15812decb6172bb30d115537f38e5228caa2fe35acc7c3027",
    "smollm2-135m-compat/csne.a-grace.jsonl": "59b617c75681315a4a94cdb180f7239fb4a5941d0b3e777eecfcaeff2bbbc9ca",
    "smollm2-135m-compat/csne.grace.jsonl": "fe188ce4ec4d0dca415e61b77deeaab200937fc0e357b1ef579cc41963226d1f",
    "smollm2-135m/cnle.a-grace-wo-cl.jsonl": "f4f55623e2c96ec131f35a710d529c8d3691679ddb9018edcd98cce77f0fbf92",
    "smollm2-135m/cnle.a-grace-wo-mean.jsonl": "cb9eefc6fc7e70a82b7eb8fc7708fa179dc6836bd706f2487c2fe2ba1d08dab9",
    "smollm2-135m/cnle.a-grace.jsonl": "a61c7281fdfa91f8199131084d7aebd3982fefec6a0a5f065ad72df53a39dcef",
    "smollm2-135m/cnle.ft-l.jsonl": "d55bb7ade21e89fc47ce39c02c29f2aad04ccd798cd1fbc3820183c0a53e4eda",
    "smollm2-135m/cnle.grace.jsonl": "7efda8f5f2706aee85dad1ac0fd441c2b0bf5f522b0cbe2f24354257bbf20417",
    "smollm2-135m/cnle.memit.jsonl": "c45de9b8ce8b730bf6fd5d19802e4c853467dcb777e6d6a0f2d2a8506c7e6bf5",
    "smollm2-135m/cnle.none.jsonl": "a7988d4983f47ee9576c66fe0dce5253ff7cd069c6e8e399cd8c20f04277b8a2",
    "smollm2-135m/cnle.pmet.jsonl": "54bb478ec9218c9316ec3ea5bfa15f399027636158504635bb0f8f9832873581",
    "smollm2-135m/cnle.rome.jsonl": "549e64f9083ec344cf5c99e1c300ca71a3437ec6d48861fe45c58f5966a169fc",
    "smollm2-135m/csne.a-grace-wo-cl.jsonl": "f02fd56f9dc818e4ff1866eafe1aabc6e9843b6b2b537134b99230485503bce5",
    "smollm2-135m/csne.a-grace-wo-mean.jsonl": "0357d79e22668ad1a120738a6bc1595df39ba428221ddf2552ce681d64185fd7",
    "smollm2-135m/csne.a-grace.jsonl": "3bc8609e1cc7198e3283bbe6fbf766def9a5da5c51ee4912c8592f4cd0bb9971",
    "smollm2-135m/csne.ft-l.jsonl": "d560fd0f730832c6afb6b6f0aa29685fd4100865595677792f9ea6fbea0aa415",
    "smollm2-135m/csne.grace.jsonl": "bf62b4264cf6f85bc78ec1d0b659f6da1c3b88aab1ce9bdb5efefc6b587a8d5b",
    "smollm2-135m/csne.memit.jsonl": "2bd72aadee31b4b57ae5f53ae7195884a2e01dc532abd6d0784d164b948b096a",
    "smollm2-135m/csne.none.jsonl": "64f84d92d56088723ee07649b49f1c3ae0ea5b7fd6eec826cb75a53e2f9f2595",
    "smollm2-135m/csne.pmet.jsonl": "054bc0c993908a129faa4752dd790ca3838898eb9c86b3c1bcf69fb491b5179a",
    "smollm2-135m/csne.rome.jsonl": "2560f6981294add519813223cebc7ca41febf3b5f7e9986be81e910dc241dc7c",
}
_FIRST = ("run", "subject", "dataset", "source", "editor", "preset", "fold", "case_id", "case_sha256")
_MEASURED = ("edit_seconds", "edit_batch", "steps", "loss", "peak_memory_mib", "initial_sha256", "distances", "fired")


def in_schema_1(record) -> dict:
    texts, hashes = record.texts or {}, record.sha256 or {}
    return {
        "schema_version": 1,
        **{name: getattr(record, name) for name in _FIRST},
        **{name: record.scores[name] for name in PAPER_METRICS},
        **{name: getattr(record, name) for name in _MEASURED},
        **{f"generated_{name}": texts.get(name) for name in TEXTS},
        **{f"sha256_{name}": hashes.get(name) for name in TEXTS},
        "error": record.error,
    }


@pytest.mark.parametrize("name", SHA256)
def test_values_texts_and_hashes_are_the_same(name):
    run, file = name.split("/")
    # only newer records say how many tokens their free texts have
    records = [record for record in read_records([RUNS / run / "records" / file]) if record.free_tokens is None]
    old = "".join(json.dumps(in_schema_1(record), ensure_ascii=False) + "\n" for record in records)
    assert hashlib.sha256(old.encode()).hexdigest() == SHA256[name]


@pytest.mark.parametrize("run", ["smollm2-135m", "smollm2-135m-compat"])
def test_records_name_a_start_that_worked_on_them(run):
    starts = {start["id"]: start for start in load_manifest(RUNS / run)["starts"]}
    for file in (RUNS / run / "records").iterdir():
        for record in read_records([file]):
            if record.start == "unknown":
                continue
            start = starts[record.start]
            assert record.editor in start["hyperparameters"] and record.dataset in start["cases"]
            assert (record.library, record.commit) == (start["library"], start["commit"])


def test_only_proof_names_a_start():
    """A-GRACE's CNLE records can only be of the one start that asked for them; of CSNE's, which four starts asked for, those that
    share a batch with a case beyond the first sixty are of the start that had asked for a hundred by then."""
    cnle, csne = (
        read_records([RUNS / "smollm2-135m" / "records" / f"{name}.a-grace.jsonl"]) for name in ("cnle", "csne")
    )
    assert {record.commit[:8] for record in cnle} == {"343c341d"}
    known = [record for record in csne if record.start != "unknown"]
    assert 0 < len(known) < len(csne) and {record.commit[:8] for record in known} == {"343c341d"}
