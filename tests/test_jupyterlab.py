"""A notebook in JupyterLab as a reader meets it, in a browser without network: it opens, and all of its cells run."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import pytest
import requests
import websocket

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.browser

RUN_ALL = """(async () => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const until = async (there) => { for (let n = 0; n < 600; n++) { const seen = there(); if (seen) return seen; await pause(200); } throw new Error(String(there)); };
  const app = await until(() => window.jupyterapp);
  await app.restored;
  const panel = await app.commands.execute("docmanager:open", {path: "scorecard.ipynb", factory: "Notebook", kernel: {name: "python3"}});
  await panel.sessionContext.ready;
  await app.commands.execute("notebook:run-all-cells");
  const look = () => [...panel.content.model.cells].map((cell) => cell.toJSON()).filter((cell) => cell.cell_type === "code");
  const failed = (cell) => cell.outputs.some((output) => output.output_type === "error");
  await until(() => look().every((cell) => cell.execution_count) || look().some(failed));
  const code = look();
  return JSON.stringify({
    title: panel.title.label,
    run: code.filter((cell) => cell.execution_count).length,
    cells: code.length,
    errors: code.flatMap((cell) => cell.outputs).filter((output) => output.output_type === "error").map((output) => output.evalue),
    text: code.map((cell) => JSON.stringify(cell.outputs)).join(" "),
  });
})()"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def answering(address: str, process: subprocess.Popen) -> requests.Response:
    for _ in range(600):
        assert process.poll() is None, f"{process.args[0]} has ended"
        try:
            return requests.get(address, timeout=5)
        except requests.ConnectionError:
            time.sleep(0.2)
    raise AssertionError(f"nothing answers at {address}")


def test_a_notebook_opens_and_runs_in_jupyterlab(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    assert browser, "install chromium to run the browser tests"
    (tmp_path / "results").symlink_to(ROOT / "results")
    jupytext.write(jupytext.read(ROOT / "notebooks" / "scorecard.py"), tmp_path / "scorecard.ipynb")
    port, debugging = free_port(), free_port()
    lab = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", f"--ServerApp.root_dir={tmp_path}",
           "--IdentityProvider.token=", "--expose-app-in-browser"]  # fmt: skip
    chromium = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
                f"--remote-debugging-port={debugging}", "--remote-allow-origins=*", "about:blank"]  # fmt: skip
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(lab, stdout=log, stderr=log, env=environment, cwd=tmp_path)
        window = subprocess.Popen(chromium, stdout=log, stderr=log)
    try:
        answering(f"http://127.0.0.1:{port}/api", server)
        pages = answering(f"http://127.0.0.1:{debugging}/json", window).json()
        (page,) = [page for page in pages if page["type"] == "page"]
        connection = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=180)

        def ask(number: int, method: str, **parameters):
            connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
            while (answer := json.loads(connection.recv())).get("id") != number:
                pass
            return answer["result"]

        ask(1, "Page.navigate", url=f"http://127.0.0.1:{port}/lab/tree/scorecard.ipynb")
        time.sleep(2)
        answer = ask(2, "Runtime.evaluate", expression=RUN_ALL, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        seen = json.loads(answer["result"]["value"])
    finally:
        for process in (window, server):
            process.terminate()
            process.wait(30)
    assert not seen["errors"] and seen["run"] == seen["cells"] > 4
    assert seen["title"] == "scorecard.ipynb" and "replicated" in seen["text"]
