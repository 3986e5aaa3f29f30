"use strict";
// The list of cases: filters, search, pages. Texts reach the page through textContent alone.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const size = 20;  // cases on a page, however many there are
  const find = id => document.getElementById(id);
  const list = find("list"), state = find("state"), form = find("filter");
  const RUN = 0, TASK = 1, CASE = 2, SITE = 3, DIAGNOSIS = 4, REFERENCE = 5, ORIGINAL = 6,
    TUNED = 7, ROUGE = 8, CLOSE = 9;
  const OUTPUT = 0, VERDICT = 1, CONFIDENCE = 2, READ = 3;
  const verdicts = ["wrong", "right", "unparseable"];
  const tests = {
    "tuned-right": row => row[TUNED][VERDICT] === 1,
    "tuned-wrong": row => row[TUNED][VERDICT] !== 1,
    "tuned-unparseable": row => row[TUNED][VERDICT] === 2,
    "only-tuned": row => row[TUNED][VERDICT] === 1 && row[ORIGINAL][VERDICT] !== 1,
    "only-original": row => row[TUNED][VERDICT] !== 1 && row[ORIGINAL][VERDICT] === 1,
    "both-wrong": row => row[TUNED][VERDICT] !== 1 && row[ORIGINAL][VERDICT] !== 1,
    "close": row => row[CLOSE] === 1,
  };
  const text = index => index === null ? "" : data.texts[index];
  const value = id => find(id) ? find(id).value.trim() : "";
  const number = id => value(id) === "" ? null : Number(value(id).replace(",", "."));
  const folded = new Map();  // what is searched, made when a case is first looked at
  const haystack = row => {
    if (!folded.has(row)) {
      const parts = [DIAGNOSIS, REFERENCE].map(field => text(row[field]));
      parts.push(row[CASE], text(row[ORIGINAL][OUTPUT]), text(row[TUNED][OUTPUT]));
      folded.set(row, parts.join("\n").toLowerCase());
    }
    return folded.get(row);
  };

  const chosen = () => {
    const run = value("by-run"), task = value("by-task"), site = value("by-site");
    const test = tests[value("by-result")], least = number("least"), most = number("most");
    const words = value("words").toLowerCase().split(/\s+/).filter(word => word);
    return data.cases.filter(row => {
      const confidence = row[TUNED][CONFIDENCE];
      return (run === "" || row[RUN] === Number(run))
        && (task === "" || row[TASK] === Number(task))
        && (site === "" || row[SITE] === Number(site))
        && (!test || test(row))
        && (least === null || (confidence !== null && confidence >= least))
        && (most === null || (confidence !== null && confidence <= most))
        && words.every(word => haystack(row).includes(word));
    });
  };

  const element = (name, content, className) => {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
  };
  const add = (terms, name, content, verdict) => {
    const description = element("dd", content || "(empty)");
    if (verdict) {
      const line = element("span", undefined, "verdict");
      line.append(element("b", verdict[0]), verdict.slice(1).map(part => "; " + part).join(""));
      description.append(line);
    }
    terms.append(element("dt", name), description);
  };
  const judged = answer => {
    const parts = [verdicts[answer[VERDICT]]];
    if (answer[READ] !== null) parts.push("read as: " + text(answer[READ]));
    if (answer[CONFIDENCE] !== null) parts.push("confidence " + answer[CONFIDENCE].toFixed(2));
    return parts;
  };
  const item = row => {
    const made = element("li"), terms = element("dl"), title = [row[CASE], data.tasks[row[TASK]]];
    if (data.runs.length > 1) title.push(data.runs[row[RUN]]);
    made.append(element("h3", title.join(", ")));
    if (row[CLOSE]) made.append(element("p", "Right words, wrong dose, side or kind", "flag"));
    if (row[SITE] !== null) add(terms, "Site", text(row[SITE]).replaceAll("_", " "));
    if (row[DIAGNOSIS] !== null) add(terms, "Diagnosis", text(row[DIAGNOSIS]));
    add(terms, "Reference", text(row[REFERENCE]));
    add(terms, "Original", text(row[ORIGINAL][OUTPUT]), judged(row[ORIGINAL]));
    const verdict = [...judged(row[TUNED]), "ROUGE-1 " + row[ROUGE].toFixed(2)];
    add(terms, "Tuned", text(row[TUNED][OUTPUT]), verdict);
    made.append(terms);
    return made;
  };

  let rows = [], start = 0;
  const show = () => {
    const page = rows.slice(start, start + size);
    list.replaceChildren(...page.map(item));
    const count = n => n.toLocaleString("en");
    state.textContent = rows.length
      ? `Cases ${count(start + 1)} to ${count(start + page.length)} of ${count(rows.length)}`
      : "No case is like that.";
    // Not `disabled`: a button that vanishes under the keyboard's focus loses the reader's place.
    find("previous").setAttribute("aria-disabled", String(start === 0));
    find("next").setAttribute("aria-disabled", String(start + size >= rows.length));
  };
  const update = () => { rows = chosen(); start = 0; show(); };
  const turn = step => {
    if (start + step < 0 || start + step >= rows.length) return;
    start += step;
    show();
    state.scrollIntoView({block: "start"});
  };
  for (const field of form.querySelectorAll("input")) field.addEventListener("input", update);
  for (const field of form.querySelectorAll("select")) field.addEventListener("change", update);
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  find("previous").addEventListener("click", () => turn(-size));
  find("next").addEventListener("click", () => turn(size));
  update();
})();
