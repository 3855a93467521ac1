"use strict";
// Opens the cells of a map into their neurons, and a neuron into its card. All text goes in as text: nothing here writes HTML.
(() => {
  const source = document.getElementById("neurons-data");
  if (!source) return;
  const { runs, cards } = JSON.parse(source.textContent);
  const number = (value) => value.toLocaleString("en");
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const share = (part, whole) => (whole ? `${(100 * part) / whole >= 9.95 || part === 0 ? Math.round((100 * part) / whole) : ((100 * part) / whole).toPrecision(2)}\u202f%` : "–");
  const words = (place) => `layer ${place.split(".")[0]}, ${place.split(".")[1]}`;

  const inContext = ([before, token, after, about]) => make("span", { class: "context" }, make("bdi", {}, before, make("mark", {}, token), after), ` ${about}`);

  const card = (run, neuron) => {
    const [, score, part, ranks, key] = neuron;
    const matrix = key.slice(0, key.lastIndexOf("."));
    const rows = run.columns.map((column, place) => {
      const [rank, kept] = [ranks[2 * place], ranks[2 * place + 1]];
      return make("li", {}, make("b", {}, column), rank ? `: rank ${number(rank)}` : ": not scored", kept ? ", kept" : ", not kept");
    });
    const made = make("div", { class: "card" }, make("p", { class: "soft" }, make("code", { class: "inline" }, `NeuronSet({"${matrix}": [${neuron[0]}]})`), part ? ` ${part}` : "", score === null ? "" : ` · score ${score}`), make("ul", {}, ...rows));
    for (const { title, items } of cards[key] || []) {
      made.append(make("h4", {}, title), make("p", {}, ...items.flatMap((item) => [Array.isArray(item) ? inContext(item) : make("bdi", { class: "token" }, item), " "])));
    }
    return made;
  };

  const table = (run, place, cell) => {
    const others = run.columns.map((column, at) => [column, at]).filter(([, at]) => at !== run.own);
    const head = ["neuron", "rank", "score", ...others.map(([column]) => `rank by ${column}`)];
    const body = make("tbody");
    for (const neuron of cell.neurons) {
      const [index, score, part, ranks, key] = neuron;
      const button = make("button", { type: "button", class: "opener", "aria-expanded": "false" }, `${part ? part + " " : ""}${index}`, cards[key] ? make("span", { class: "has-card" }, " card") : "");
      const rank = (at) => (ranks[2 * at] ? number(ranks[2 * at]) : "–") + (at !== run.own && ranks[2 * at + 1] ? " kept" : "");
      const kept = ranks[2 * run.own + 1];
      const row = make("tr", kept ? {} : { class: "quiet" }, make("th", { scope: "row" }, button), make("td", {}, rank(run.own), kept ? "" : " not kept"), make("td", {}, score === null ? "–" : String(score)), ...others.map(([, at]) => make("td", {}, rank(at))));
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", String(!open));
        if (open) row.nextSibling.remove();
        else row.after(make("tr", { class: "opened" }, make("td", { colspan: head.length }, card(run, neuron))));
      });
      body.append(row);
    }
    const caption = make("caption", { class: "seen-not" }, `Neurons of ${words(place)}, ${run.method}`);
    const top = make("thead", {}, make("tr", {}, ...head.map((label) => make("th", { scope: "col" }, label))));
    return make("table", {}, caption, top, body);
  };

  const show = (part, run, panel, place) => {
    const cell = run.cells[place];
    const [layer, site] = place.split(".");
    const listed = cell.neurons.filter((neuron) => neuron[3][2 * run.own + 1]).length;
    const said = [`${number(cell.kept)} of ${number(cell.of)} neurons kept (${share(cell.kept, cell.of)}), ${share(cell.kept, run.kept)} of the set`];
    if (cell.mean !== null) said.push(`mean score ${cell.mean}`);
    if (listed < cell.kept) said.push(`listed: the ${listed} with the largest scores`);
    const title = make("h4", {}, `Layer ${layer}, ${site}`);
    const status = make("p", { class: "soft", role: "status" }, said.join("; ") + ".");
    const list = make("div", { class: "list", role: "region", tabindex: "0", "aria-label": `Neurons of ${words(place)}` }, table(run, place, cell));
    panel.replaceChildren(panel.firstChild, title, status, list);
    panel.firstChild.lastChild.value = place;
    for (const mark of part.querySelectorAll("[data-cell]")) {
      const chosen = mark.dataset.cell === place;
      mark.setAttribute("aria-pressed", String(chosen));
      mark.setAttribute("tabindex", chosen ? "0" : "-1");
    }
  };

  const move = (run, place, key) => {
    const [layer, site] = place.split(".");
    const layers = [...new Set(Object.keys(run.cells).map((each) => Number(each.split(".")[0])))].sort((a, b) => a - b);
    const sites = ["q", "k", "v", "o", "gate", "up", "down"].filter((each) => Object.keys(run.cells).some((cell) => cell.endsWith("." + each)));
    const [down, across] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[key] || [0, 0];
    const next = `${layers[layers.indexOf(Number(layer)) + down]}.${sites[sites.indexOf(site) + across]}`;
    return run.cells[next] ? next : place;
  };

  for (const part of document.querySelectorAll(".explorer")) {
    const run = runs[Number(part.dataset.run)];
    const panel = part.querySelector(".panel");
    const places = Object.keys(run.cells);
    const box = make("select", {}, ...places.map((place) => make("option", { value: place }, words(place))));
    panel.replaceChildren(make("label", {}, "Matrix ", box));
    box.addEventListener("change", () => show(part, run, panel, box.value));
    for (const drawn of part.querySelectorAll(".drawn")) {
      drawn.setAttribute("role", "group");
      drawn.querySelector("svg").removeAttribute("aria-hidden");
      for (const text of drawn.querySelectorAll("text")) text.setAttribute("aria-hidden", "true");
    }
    for (const mark of part.querySelectorAll("[data-cell]")) {
      mark.setAttribute("role", "button");
      mark.setAttribute("aria-label", mark.querySelector("title").textContent);
      mark.addEventListener("click", () => show(part, run, panel, mark.dataset.cell));
      mark.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") show(part, run, panel, mark.dataset.cell);
        else if (!event.key.startsWith("Arrow")) return;
        else {
          const next = move(run, mark.dataset.cell, event.key);
          show(part, run, panel, next);
          mark.closest("svg").querySelector(`[data-cell="${next}"]`)?.focus();
        }
        event.preventDefault();
      });
    }
    const first = places.reduce((best, place) => (run.cells[place].kept > run.cells[best].kept ? place : best), places[0]);
    if (first !== undefined) {
      show(part, run, panel, first);
      panel.hidden = false;
    }
  }
  for (const hint of document.querySelectorAll(".scripted")) hint.hidden = false;
})();
