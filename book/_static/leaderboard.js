// The leaderboard: its rows are sorted and filtered here; cases and prompts are loaded when they are asked for. Texts of datasets and
// models only ever become text nodes.
"use strict";
const clme = (() => {
  const place = document.getElementById("clme-leaderboard");
  const waiting = {};
  const state = { sort: null, down: true, filters: {}, group: null };
  const FILTERS = { subject: "Subject", dataset: "Data", editor: "Editor", preset: "Preset", protocol: "Protocol" };
  let board, rows;

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  };

  // A file calls loaded(NAME, DATA); scripts may be loaded from a disk too, where data may not.
  const load = (name) => {
    if (!waiting[name]) {
      const request = (waiting[name] = {});
      request.promise = new Promise((resolve, reject) => {
        request.resolve = resolve;
        const failed = () => { delete waiting[name]; reject(new Error(`${name} could not be loaded`)); };
        document.head.append(make("script", { src: `${place.dataset.files}${name}.js`, onerror: failed }));
      });
    }
    return waiting[name].promise;
  };
  const loaded = (name, data) => waiting[name].resolve(data);

  const hundred = (number) => (number === null || number === undefined ? "–" : (100 * number).toFixed(1));
  const columns = () => Object.keys(board.columns).filter(
    (name) => board.columns[name].group === state.group && rows.some((row) => row.scores[name]));

  const chosen = () => {
    rows = board.rows.filter((row) => Object.entries(state.filters).every(([name, value]) => !value || row[name] === value));
    if (state.sort !== null) {
      const key = (row) => (state.sort in row ? row[state.sort] : (row.scores[state.sort] || [null])[0]);
      const sign = state.down ? -1 : 1;
      rows.sort((first, second) => {
        const [a, b] = [key(first), key(second)];
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
      });
    }
  };

  const choice = (name, title, values, value, change) => {
    const options = values.map(([key, shown]) => {
      const option = make("option", { value: key }, shown);
      option.selected = key === value;
      return option;
    });
    return make("label", {}, `${title} `, make("select", { "data-filter": name, onchange: (event) => { change(event.target.value); show(); } }, ...options));
  };

  const head = (name, title) => {
    const sorted = state.sort === name;
    const sort = () => { state.down = sorted ? !state.down : true; state.sort = name; show(name); };
    const order = sorted ? (state.down ? "descending" : "ascending") : "none";
    const arrow = sorted ? (state.down ? " ▼" : " ▲") : "";
    return make("th", { scope: "col", "aria-sort": order }, make("button", { type: "button", "data-sort": name, onclick: sort }, title + arrow));
  };

  const cell = (row, name) => {
    const score = row.scores[name];
    if (!score) return make("td", {}, "–");
    const bounds = score[1] === null ? "" : `${hundred(score[1])}–${hundred(score[2])}`;
    const of = score[3] < row.n ? `n = ${score[3]}` : "";
    const said = `${board.columns[name].title} of ${row.editor} on ${row.dataset}, ${row.subject}: ${hundred(score[0])}; show its cases`;
    const open = () => cases(row, name).catch(fail);
    return make("td", {}, make("button", { type: "button", "aria-label": said, onclick: open }, hundred(score[0])),
      bounds || of ? make("small", {}, ` ${[bounds, of].filter(Boolean).join(", ")}`) : null);
  };

  const line = (row) => {
    const protocol = row.protocol + (row.edits > 1 ? `, ${row.edits} edits` : "");
    const editor = row.authors ? `${row.editor} (submitted by ${row.authors})` : row.editor;
    return make("tr", {}, make("td", {}, row.subject), make("td", {}, row.dataset), make("th", { scope: "row" }, editor), make("td", {}, row.preset),
      make("td", {}, protocol), make("td", {}, String(row.n)), ...columns().map((name) => cell(row, name)));
  };

  const download = (name, kind, text) => {
    const address = URL.createObjectURL(new Blob([text], { type: kind }));
    const link = make("a", { href: address, download: name });
    link.click();
    URL.revokeObjectURL(address);
  };
  const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const asCsv = () => {
    const about = ["run", "subject", "dataset", "editor", "preset", "protocol", "edits", "n"];
    const scores = columns();
    const titles = [...about, ...scores.flatMap((name) => [name, `${name}_low`, `${name}_high`, `${name}_n`])];
    const lines = rows.map((row) => [...about.map((name) => row[name]), ...scores.flatMap((name) => row.scores[name] || ["", "", "", ""])]);
    return [titles, ...lines].map((values) => values.map(quoted).join(",")).join("\r\n") + "\r\n";
  };

  const fail = (error) => place.querySelector("[role=status]").replaceChildren(error.message);

  const show = (focus = null) => {
    chosen();
    const filters = Object.entries(FILTERS).map(([name, title]) => {
      const values = [...new Set(board.rows.map((row) => row[name]))].map((value) => [value, value]);
      return choice(name, title, [["", "all"], ...values], state.filters[name] || "", (value) => { state.filters[name] = value; });
    });
    const groups = [...new Set(Object.values(board.columns).map((column) => column.group))].map((group) => [group, group]);
    filters.push(choice("group", "Scores", groups, state.group, (value) => { state.group = value; }));
    const about = [["subject", "Subject"], ["dataset", "Data"], ["editor", "Editor"], ["preset", "Preset"], ["protocol", "Protocol"], ["n", "n"]];
    const titles = [...about, ...columns().map((name) => [name, board.columns[name].title])];
    const table = make("table", { class: "table" }, make("caption", {}, "Means times 100 with 95% intervals."),
      make("thead", {}, make("tr", {}, ...titles.map(([name, title]) => head(name, title)))), make("tbody", {}, ...rows.map(line)));
    const opened = place.querySelector(".leaderboard-cases");
    place.replaceChildren(make("form", { class: "leaderboard-filters", onsubmit: (event) => event.preventDefault() }, ...filters),
      make("p", { role: "status" }, `${rows.length} of ${board.rows.length} results`),
      make("div", { class: "leaderboard-scroll", tabindex: "0", role: "region", "aria-label": "results" }, table),
      make("p", {}, make("button", { type: "button", onclick: () => download("clme-leaderboard.csv", "text/csv", asCsv()) }, "These rows as CSV"), " ",
        make("button", { type: "button", onclick: () => download("clme-leaderboard.json", "application/json", JSON.stringify(rows)) }, "as JSON")),
      opened || make("section", { class: "leaderboard-cases", "aria-live": "polite" }));
    if (focus) place.querySelector(`[data-sort="${focus}"]`).focus();
  };

  const place_of = (...content) => {
    const section = place.querySelector(".leaderboard-cases");
    section.replaceChildren(...content);
    const title = section.querySelector("h2");
    title.setAttribute("tabindex", "-1");
    title.focus();
  };

  const cases = async (row, name) => {
    const all = [...(await load(row.cases))];
    const value = (each) => each.scores[name];
    all.sort((first, second) => (value(first) === null) - (value(second) === null) || value(first) - value(second) || first.id - second.id);
    const lines = all.map((each) => make("tr", {},
      make("th", { scope: "row" }, make("button", { type: "button", onclick: () => detail(row, name, each.id).catch(fail) }, `case ${each.id}`)),
      make("td", {}, hundred(value(each))), make("td", {}, each.steps === null ? "–" : String(each.steps)), make("td", {}, each.loss === null ? "–" : each.loss.toFixed(3))));
    place_of(make("h2", {}, `${board.columns[name].title}: ${row.editor}, ${row.dataset}, ${row.subject}`),
      row.about ? make("p", {}, row.about) : "",
      make("div", { class: "leaderboard-scroll", tabindex: "0", role: "region", "aria-label": "cases" }, make("table", { class: "table" },
        make("thead", {}, make("tr", {}, ...["Case", board.columns[name].title, "Steps", "Last loss"].map((title) => make("th", { scope: "col" }, title)))),
        make("tbody", {}, ...lines))));
  };

  const text = (title, content) => [make("dt", {}, title), make("dd", {}, make("pre", {}, content))];

  const written = (row, each) => {
    const provenance = `start ${each.start}, commit ${each.commit.slice(0, 10)}, library ${each.library.slice(0, 10)}`;
    const parts = [make("h3", {}, row.editor), make("p", {}, `Record: run ${row.run}, ${provenance}.`)];
    if (each.distances) {
      const names = each.distances.map((_, number) => ["edit prompt", "rephrased prompt"][number] || `neighbour ${number - 1}`);
      const told = names.map((title, number) => `${title} ${each.distances[number] === null ? "–" : each.distances[number].toFixed(2)}${each.fired && each.fired[number] ? " (fired)" : ""}`);
      parts.push(make("p", {}, `Distances: ${told.join("; ")}.`));
    }
    if (each.texts === null) parts.push(make("p", {}, "The texts of this dataset are not ours to publish; the record has their hashes."));
    else parts.push(make("dl", {}, ...Object.entries(each.texts).flatMap(([measure, texts]) => texts.flatMap((content, number) =>
      text(`${measure.replaceAll("_", " ")}${texts.length > 1 ? ` ${number + 1}` : ""}`, content)))));
    const scores = Object.entries(each.scores).filter(([, value]) => value !== null).map(([key, value]) => `${board.columns[key].title} ${hundred(value)}`);
    parts.push(make("p", {}, make("small", {}, scores.join("; "))));
    return make("div", {}, ...parts);
  };

  const detail = async (row, name, id) => {
    const beside = board.rows.filter((other) => ["run", "subject", "dataset", "preset", "protocol", "edits"].every((key) => other[key] === row[key]));
    beside.sort((first, second) => (second === row) - (first === row));
    const edited = await Promise.all(beside.map(async (other) => [other, (await load(other.cases)).find((each) => each.id === id)]));
    const own = edited[0][1];
    const about = row.prompts ? (await load(row.prompts))[id] : undefined;
    const known = about && about.sha256 === own.sha256 ? make("dl", {}, ...text("edit prompt", about.prompt), ...text("target", about.target),
      ...about.rephrased.flatMap((prompt) => text("rephrased prompt", prompt)), ...about.neighbours.flatMap((prompt, number) => text(`neighbour ${number + 1}`, prompt)))
      : make("p", {}, "Prompt and target are not on this page.");
    const back = make("p", {}, make("button", { type: "button", onclick: () => cases(row, name).catch(fail) }, "back to the cases"));
    place_of(make("h2", {}, `Case ${id}, ${row.dataset}, ${row.subject}`), back, known, ...edited.filter(([, each]) => each).map(([other, each]) => written(other, each)));
  };

  if (place) {
    load("board").then((content) => {
      board = content;
      state.group = Object.values(board.columns)[0].group;
      show();
      document.getElementById("clme-leaderboard-plain").hidden = true;
    }).catch((error) => place.replaceChildren(make("p", {}, error.message)));
  }
  return { loaded };
})();
