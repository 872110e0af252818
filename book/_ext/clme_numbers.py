"""Sphinx extension: numbers in the prose are computed from the published records, never typed."""

import os
import tempfile
from pathlib import Path

import pandas as pd


def _numbers(root: Path) -> dict[str, str]:
    from clme_lib.datasets import embedded_cnle, mining
    from clme_lib.study.run_folder import load_manifest, load_run
    from clme_lib.study.tables import editor_name, interval

    numbers = {}
    targets, pool = embedded_cnle.read_rows("cnle-targets"), embedded_cnle.read_rows("cnle-pool")
    lengths = sorted(len(row["snippet"]) for row in targets)
    numbers["cnle_targets"], numbers["cnle_pool"] = str(len(targets)), str(len(pool))
    numbers["csne_targets"], numbers["csne_pool"] = str(mining.TARGETS), str(mining.POOL)
    numbers["cnle_median"] = str(lengths[len(lengths) // 2])
    numbers["cnle_calls"] = str(len(set().union(*(embedded_cnle.calls(row["snippet"]) for row in targets))))
    numbers |= _benchmark()
    folder = root / "results" / "runs" / "smollm2-135m"
    records = load_run(folder)
    counts = records.groupby(["dataset", "editor"]).size()
    numbers["run_cases"] = " to ".join(map(str, dict.fromkeys((counts.min(), counts.max()))))
    numbers["run_folder"] = f"`results/runs/{folder.name}`"
    numbers["run_table"] = _provenance(load_manifest(folder)["starts"], counts)
    for (dataset, editor), mine in records.groupby(["dataset", "editor"]):
        for measure in ("effectiveness", "generalization", "specificity"):
            numbers[f"{dataset}_{editor.replace('-', '_')}_{measure}"] = (
                f"{100 * interval(mine[f'{measure}_em'], binary=True).mean:.1f} %"
            )
    grace = records[(records["editor"] == "grace")]
    for dataset, mine in grace.groupby("dataset"):
        distances = pd.DataFrame(mine["distances"].tolist())
        numbers[f"{dataset}_rephrased_distance"] = f"{distances[1].median():.1f}"
        numbers[f"{dataset}_nearest_neighbour"] = f"{distances.iloc[:, 2:].min().min():.1f}"
        numbers[f"{dataset}_rephrased_fired"] = f"{100 * (distances[1] <= 1).mean():.1f} %"
    numbers |= _appendices(root / "results")
    numbers["editors"] = ", ".join(editor_name(name) for name in records["editor"].unique())
    return numbers


def _appendices(results: Path) -> dict[str, str]:
    """The appendices' tables."""
    from clme_lib.editors.registry import EDITORS
    from clme_lib.study.appendices import encoder_settings, selection, statistics, weight_updates

    def read(part: str, name: str = "") -> pd.DataFrame:
        return pd.read_csv(results / part / f"smollm2-135m{name}.csv")

    def by_editor(part: str) -> dict[str, pd.DataFrame]:
        return {
            name: read(part, f".{name}") for name in EDITORS if (results / part / f"smollm2-135m.{name}.csv").is_file()
        }

    compared = read("encoders")
    by_setting, by_size = encoder_settings.encoder_tables(compared)
    tables = {
        **{
            f"selection_{name.replace('-', '_')}": selection.selection_table(one)
            for name, one in by_editor("selection").items()
        },
        "values_table": selection.values_table(),
        "preset_table": selection.preset_table(by_editor("presets")),
        "diagnosis_table": weight_updates.diagnosis_table(read("diagnosis")),
        "pmet_table": weight_updates.pmet_table(read("diagnosis", ".pmet")),
        "statistics_table": statistics.statistics_table(read("statistics")),
        "encoder_table": by_setting,
        "encoder_sizes": by_size,
    }
    return {"encoder_count": str(len(compared)), **{name: table.to_myst() for name, table in tables.items()}}


def _benchmark() -> dict[str, str]:
    """Tables II and III and sample cases of what is at hand: the data sets built in the folders that CLME_BUILDS names
    (``make site BUILDS="data/cnle data/csne"``), else the embedded ones; embedded CSNE only where it has been mined already."""
    from clme_lib.datasets import embedded_csne
    from clme_lib.datasets.construction import pipeline, relevance, rephrasing
    from clme_lib.datasets.registry import load_cases
    from clme_lib.study import benchmark as tables

    sets = {"CNLE": load_cases("cnle")}
    if embedded_csne.is_mined():
        sets["CSNE"] = load_cases("csne")
    built = {}
    for folder in map(Path, os.environ.get("CLME_BUILDS", "").split()):
        cases = pipeline.built_cases(folder)
        built[cases[0].dataset] = folder
        sets[f"{cases[0].dataset.upper()} (built)"] = cases
    with tempfile.TemporaryDirectory() as scratch:
        folder = built.get("cnle", Path(scratch))
        if "cnle" not in built:
            scorer, rephraser = relevance.OFFLINE_SCORER, rephrasing.GIVEN_INTENTS
            pipeline.build_cnle(folder, "embedded", scorer, rephraser, targets=None, seed=42)
        what = f"those of {folder.name}" if "cnle" in built else "the embedded pairs by the offline scorer"
        levels = tables.level_table(pipeline.level_counts(folder), what)
    samples = {name.split()[0]: tables.sample_cases(cases) for name, cases in sets.items()}  # the built one comes last
    missing = "_CSNE is mined on the reader's machine by_ `clme prepare`; _this page was built before that._"
    return {
        "level_table": levels.to_myst(),
        "length_table": tables.length_table(sets).to_myst(),
        "cnle_samples": samples["CNLE"],
        "csne_samples": samples.get("CSNE", missing),
    }


def _provenance(starts: list[dict], counts: pd.Series) -> str:
    """A table: on what, with what and from which commit each editor's records were made."""
    from clme_lib.editors.registry import EDITORS
    from clme_lib.study.tables import editor_name

    rows = ["| Editor | Cases | Hardware | PyTorch | Transformers | Program |", "|---|---|---|---|---|---|"]
    by_editor = dict(iter(counts.groupby("editor")))
    for editor, mine in ((name, by_editor[name]) for name in EDITORS if name in by_editor):
        # the first start that finished what is published (later ones found nothing to do), else the last that worked on it
        worked = [s for s in starts if editor in s["hyperparameters"] and max(s["cases"].values()) >= mine.max()]
        made = [s for s in worked if "finished" in s] or worked[-1:]
        hardware, versions = made[0]["hardware"], made[0]["versions"]
        threads = "" if hardware["device"] == "cuda" else f", {hardware['threads']} thread(s)"
        known = made[0]["commit"] != "unknown"
        program = f"commit `{made[0]['commit'][:10]}`" if known else f"library `{made[0]['library'][:10]}`"
        cells = [editor_name(str(editor)), " + ".join(map(str, mine)), hardware["name"] + threads,
                 versions["torch"], versions["transformers"], program]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def load_numbers(app, config):
    """Make every number available as ``{{ name }}``."""
    root = Path(app.srcdir)
    config.myst_substitutions = {**config.myst_substitutions, **_numbers(root)}


def setup(app):
    app.connect("config-inited", load_numbers)
    return {"parallel_read_safe": True, "version": "1"}
