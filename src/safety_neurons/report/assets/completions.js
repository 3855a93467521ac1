"use strict";
// Searches and filters the completions. All text goes in as text: nothing here writes HTML.
(() => {
  const source = document.getElementById("completions-data");
  const table = document.getElementById("answers");
  if (!source || !table) return;
  const { sheets, texts, words: said } = JSON.parse(source.textContent);
  const lower = texts.map((text) => text.toLowerCase());
  const at = (id) => document.getElementById(id);
  const [query, sheetBox, treatment, kind, judge, verdict] = ["query", "sheet", "treatment", "kind", "judge", "verdict"].map(at);
  const more = at("more");
  const tones = { refused: "fact", "partly refused": "partly", harmful: "no", safe: "yes" };
  const PAGE = 25;
  const LONG = 420;
  let limit = PAGE;

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const words = (text) => {
    if (text.length <= LONG) return make("bdi", { class: "text", dir: "auto" }, text);
    const start = make("bdi", { class: "text start", dir: "auto" }, text.slice(0, LONG - 120) + "…");
    const all = make("span", { class: "more" }, `all ${text.length.toLocaleString("en")} characters`);
    return make("details", {}, make("summary", {}, start, " ", all), make("bdi", { class: "text", dir: "auto" }, text));
  };
  const choices = (box, labels, chosen) => {
    box.replaceChildren(...labels.map(([value, label]) => make("option", { value }, label)));
    box.value = String(chosen);
  };
  const sheet = () => sheets[Number(sheetBox.value)];
  const base = () => sheet().arms.findIndex((arm) => arm === "untreated" || arm === "unguarded");
  const columns = () => {
    return [...new Set([base(), Number(treatment.value), sheet().arms.indexOf("aligned")])].filter((arm) => arm >= 0);
  };
  const answer = (row, arm) => row[3].find((entry) => entry[0] === arm);
  const word = (entry) => (entry ? said[entry[2 + Number(judge.value)]] : undefined);

  const matching = () => {
    const wanted = query.value.trim().toLowerCase();
    const treated = Number(treatment.value);
    const shown = columns();
    return sheet().rows.filter((row) => {
      if (kind.value && row[0] !== kind.value) return false;
      const found = word(answer(row, treated));
      if (verdict.value === "changed" && (!found || found === word(answer(row, base())))) return false;
      if (verdict.value && verdict.value !== "changed" && found !== verdict.value) return false;
      if (!wanted) return true;
      return [row[1], row[2], ...shown.map((arm) => (answer(row, arm) || [])[1])].some((text) => text !== undefined && lower[text].includes(wanted));
    });
  };

  const cell = (row, arm) => {
    const entry = answer(row, arm);
    const place = make("td", { role: "cell", "data-arm": sheet().arms[arm] });
    const label = word(entry);
    if (label) place.append(make("span", { class: "verdict " + (tones[label] || "open") }, label));
    place.append(entry ? words(texts[entry[1]]) : "–");
    return place;
  };
  const draw = () => {
    const rows = matching();
    const shown = columns();
    const head = ["prompt", ...shown.map((arm) => sheet().arms[arm])];
    const headers = head.map((label) => make("th", { scope: "col", role: "columnheader" }, make("bdi", {}, label)));
    table.tHead.replaceChildren(make("tr", { role: "row" }, ...headers));
    table.tBodies[0].replaceChildren(
      ...rows.slice(0, limit).map((row) => {
        const label = make("span", { class: "kind" }, make("bdi", {}, texts[row[1]]), row[0] ? " · " + row[0] : "");
        const header = make("th", { scope: "row", role: "rowheader" }, label, words(texts[row[2]]));
        return make("tr", { role: "row" }, header, ...shown.map((arm) => cell(row, arm)));
      })
    );
    at("answers-caption").textContent = sheet().title;
    at("status").textContent = `${rows.length.toLocaleString("en")} of ${sheet().rows.length.toLocaleString("en")} prompts`;
    more.hidden = rows.length <= limit;
    more.textContent = `Show ${Math.min(PAGE, rows.length - limit)} more`;
  };
  const start = () => {
    const { arms, judges, rows, shown } = sheet();
    choices(judge, judges.map((name, place) => [place, name]), Math.max(judges.length - 1, 0));
    judge.parentElement.hidden = judges.length < 2;
    const occurs = new Set(rows.flatMap((row) => row[3].flatMap((entry) => entry.slice(2))));
    const kept = verdict.value;
    choices(verdict, [["", "any"], ["changed", "changed by the treatment"], ...said.filter((_, place) => occurs.has(place)).map((label) => [label, label])], kept);
    if (verdict.selectedIndex < 0) verdict.value = "";
    const treated = arms.map((arm, place) => [place, arm]).filter(([, arm]) => arm !== "untreated" && arm !== "unguarded" && arm !== "aligned");
    const first = shown.find((arm) => treated.some(([place]) => place === arm));
    choices(treatment, treated.length ? treated : [[0, arms[0]]], first === undefined ? (treated[0] || [0])[0] : first);
    fresh();
  };
  const fresh = () => {
    limit = PAGE;
    draw();
  };
  choices(sheetBox, sheets.map((each, place) => [place, each.title]), 0);
  sheetBox.addEventListener("change", start);
  for (const box of [treatment, kind, judge, verdict]) box.addEventListener("change", fresh);
  let waiting;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(fresh, 120);
  });
  more.addEventListener("click", () => {
    limit += PAGE;
    draw();
  });
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("controls").hidden = false;
  start();
})();
