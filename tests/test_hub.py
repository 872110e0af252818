"""What is fetched from the Hugging Face hub: a subject, an encoder and the sources, from a stand-in on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel

from clme_lib.datasets.construction import sources
from clme_lib.datasets.paper import CNLE

NOT_FOUND = {"repository": "RepoNotFound", "revision": "RevisionNotFound", "file": "EntryNotFound"}


def commit_of(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that its client uses: information, listing and files of ``root/KIND/OWNER/NAME/REVISION``."""

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        kind = "datasets" if "datasets" in path.split("/")[:2] else "models"
        path = path.removeprefix("api/").removeprefix(f"{kind}/")
        for verb in ("revision", "tree", "resolve"):
            repository, separator, rest = path.partition(f"/{verb}/")
            if separator:
                return self.answer(kind, repository, verb, rest)
        return self.missing("repository")

    do_HEAD = do_GET

    def answer(self, kind, repository, verb, rest):
        folder = self.server.root / kind / repository
        if not folder.is_dir():
            return self.missing("repository")
        known = {name: folder / name.replace("/", "--") for name in ("main", "refs/convert/parquet")}
        known |= {commit_of(name): place for name, place in known.items()}
        revision = next((name for name in known if rest == name or rest.startswith(name + "/")), None)
        if revision is None or not known[revision].is_dir():
            return self.missing("revision")
        place, name = known[revision], rest[len(revision) + 1 :]
        sha = next(commit for commit in map(commit_of, known) if known.get(commit) == place)
        files = {str(file.relative_to(place)): file for file in sorted(place.rglob("*")) if file.is_file()}
        if verb == "revision":
            listed = {"id": repository, "sha": sha, "siblings": [{"rfilename": path} for path in files], "tags": []}
            return self.send(json.dumps(listed).encode(), "application/json")
        if verb == "tree":
            inside = [path for path in files if path.startswith(name)]
            listed = [
                {"type": "file", "path": path, "size": files[path].stat().st_size, "oid": commit_of(path)}
                for path in inside
            ]
            return self.send(json.dumps(listed).encode(), "application/json") if listed else self.missing("file")
        if name not in files:
            return self.missing("file")
        return self.send(files[name].read_bytes(), "application/octet-stream", sha)

    def send(self, content, kind, sha=None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if sha:
            self.send_header("X-Repo-Commit", sha)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def missing(self, what):
        self.send_response(404)
        self.send_header("X-Error-Code", NOT_FOUND[what])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """A running hub without repositories: ``hub.at(KIND, NAME, REVISION)`` makes one's folder, ``hub.run(CODE)`` runs Python with it."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    running.root, running.asked = tmp_path / "hub", []

    def at(kind, name, revision="main"):
        folder = running.root / kind / name / revision.replace("/", "--")
        folder.mkdir(parents=True)
        return folder

    def run(code):
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{running.server_port}", "HF_HOME": str(tmp_path / "home"),
               "HF_HUB_DISABLE_XET": "1", "CLME_CACHE": str(tmp_path / "cache")}  # fmt: skip
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run([sys.executable, "-c", code], env={**clean, **own}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    running.at, running.run = at, run
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()


TRY = """
from clme_lib.support.errors import StudyError
def tell(act):
    try:
        print(act())
    except StudyError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_a_subject_comes_from_the_hub(hub, llama):
    folder = hub.at("models", "owner/tiny")
    llama.model.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    pickled = hub.at("models", "owner/pickled")
    llama.model.config.save_pretrained(pickled)
    llama.tokenizer.save_pretrained(pickled)
    torch.save(llama.model.state_dict(), pickled / "pytorch_model.bin")
    code = f"""{TRY}
from clme_lib import load_subject
from clme_lib.subjects.subject import is_cached
print(is_cached("owner/tiny"))
tell(lambda: load_subject("owner/tiny", "cpu").fingerprint)
print(is_cached("owner/tiny"))
tell(lambda: load_subject("owner/pickled", "cpu"))
tell(lambda: load_subject("owner/nothing", "cpu"))
"""
    before, fingerprint, after, no_pickles, nothing = hub.run(code)
    assert (before, after) == ("False", "True") and fingerprint == f"hub-commit:{commit_of('main')}"
    assert no_pickles.startswith("refused: subject 'owner/pickled' could not be loaded") and "safetensors" in no_pickles
    assert "owner/pickled/resolve/main/pytorch_model.bin" not in hub.asked
    assert nothing.startswith("refused: subject 'owner/nothing' could not be loaded") and "Check the name" in nothing


@pytest.mark.slow
def test_sources_and_encoders_come_from_the_hub(hub):
    """CoNaLa as the hub keeps it; CodeSearchNet as a repository whose files the hub has converted."""
    cnle = hub.at("datasets", sources.HUB[CNLE.name][0])
    (cnle / "data").mkdir()
    pairs = pd.DataFrame({"intent": ["a b", "c d"], "snippet": ["e()", "f()"]})
    pairs.to_parquet(cnle / "data" / "train-00000-of-00001.parquet")
    (cnle / "README.md").write_text("a card")
    csne, name = hub.at("datasets", sources.HUB["csne"][0]), sources.HUB["csne"][0]
    (csne / "script.py").write_text("raise SystemExit('remote code ran')")
    for language in ("python", "ruby"):
        part = hub.at("datasets", name, "refs/convert/parquet") / language / "test" if language == "python" else (
            hub.root / "datasets" / name / "refs--convert--parquet" / language / "test"
        )  # fmt: skip
        part.mkdir(parents=True)
        row = {
            "func_code_string": "def f(a):\n    return a",
            "func_documentation_string": f"Give {language} back again.",
        }
        pd.DataFrame([row]).to_parquet(part / "0000.parquet")
    encoder = hub.at("models", "owner/encoder")
    BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(encoder)
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    code = f"""{TRY}
from clme_lib.datasets.construction import language_models, sources
from clme_lib.datasets.paper import CNLE
tell(lambda: [row["intent"] for row in sources.collect_pairs("hub")])
tell(lambda: [(row["doc"], row["partition"]) for row in sources.collect_functions("hub")])
tell(lambda: [file.name for file in sources.hub_files(CNLE)])
tell(lambda: language_models.card_pooling("owner/encoder"))
tell(lambda: language_models.card_pooling("owner/nothing"))
sources.HUB[CNLE.name] = ("owner/nothing", "**.parquet")
tell(lambda: sources.hub_files(CNLE))
"""
    intents, functions, files, pooling, default, nothing = hub.run(code)
    assert intents == "['a b', 'c d']" and functions == "[('Give python back again.', 'test')]"
    assert files == "['train-00000-of-00001.parquet']" and (pooling, default) == ("cls", "mean")
    assert nothing.startswith("refused: owner/nothing could not be downloaded") and nothing.endswith("with --source")
    assert not any(
        ("ruby" in path and "resolve" in path) or "script.py" in path or "README" in path for path in hub.asked
    )
