"use strict";
{
  const lines = JSON.parse(document.getElementById("lines").textContent);
  const names = JSON.parse(document.getElementById("names").textContent);
  // What of a line is searched: the node's own name, its op and its module, not what it reads.
  const key = (line) => {
    const [name, rest] = line.split(/: (.*)/s);
    const op = /= ([\w.]+)/.exec(rest || "");
    const origin = /  # (.*)$/.exec(line);
    return [name, op ? op[1] : "", origin ? origin[1] : ""].join(" ").toLowerCase();
  };
  const keys = lines.map(key);
  const boxes = [...document.querySelectorAll(".box")];
  const numbers = new Map(boxes.map((box) => [box, box.dataset.l.split(" ").map(Number)]));
  const rows = [...document.querySelectorAll("tr.line")];
  const rowKeys = new Map(rows.map((row) => [row, key(row.cells[1].textContent)]));
  const passes = [...document.querySelectorAll(".pass")];
  const query = document.getElementById("q");
  const found = document.getElementById("found");

  // Of layers that are alike only one is drawn, so a node may be known and yet not be drawn.
  const elsewhere = (wanted) => {
    for (const [layer, text] of Object.entries(names)) {
      const name = text.split(" ").find((each) => each.toLowerCase() === wanted);
      if (name) return `not drawn: ${name} is of ${layer}, and one that is like it is drawn`;
    }
    return "no such node, op or module";
  };

  const search = () => {
    const wanted = query.value.trim().toLowerCase();
    document.body.classList.toggle("searching", wanted !== "");
    const hit = new Set();
    if (wanted) keys.forEach((text, i) => text.includes(wanted) && hit.add(i));
    for (const box of boxes) {
      box.classList.toggle("match", numbers.get(box).some((i) => hit.has(i)));
    }
    for (const row of rows) {
      row.classList.toggle("match", wanted !== "" && rowKeys.get(row).includes(wanted));
    }
    let some = 0;
    for (const pass of passes) {
      const count = pass.querySelectorAll(".box.match").length;
      const has = count > 0 || pass.querySelector("tr.line.match") !== null;
      pass.classList.toggle("has", has);
      pass.querySelector(".hits").textContent = wanted && count ? `${count} drawn` : "";
      some += has ? 1 : 0;
    }
    if (!wanted) found.textContent = "";
    else if (some) found.textContent = `in ${some} of ${passes.length} passes`;
    else found.textContent = elsewhere(wanted);
  };

  const show = (box) => {
    const figure = box.closest("figure");
    const text = figure.querySelector(".text");
    const again = box.classList.contains("shown");
    figure.querySelectorAll(".shown").forEach((other) => other.classList.remove("shown"));
    box.classList.toggle("shown", !again);
    text.hidden = again;
    text.textContent = again ? "" : numbers.get(box).map((i) => lines[i]).join("\n");
  };

  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.matches(".pass")) {
      target.open = true;
      target.scrollIntoView();
    }
  };

  // A drawing that is wider than its place starts in its middle.
  for (const pass of passes) {
    pass.addEventListener("toggle", () => {
      for (const graph of pass.querySelectorAll(".graph")) {
        graph.scrollLeft = (graph.scrollWidth - graph.clientWidth) / 2;
      }
    });
  }
  query.addEventListener("input", search);
  document.getElementById("search").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("click", (event) => {
    const box = event.target.closest(".box");
    if (box) show(box);
  });
  document.addEventListener("keydown", (event) => {
    const box = event.target.closest(".box");
    if (box && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      show(box);
    } else if (event.key === "/" && event.target !== query) {
      event.preventDefault();
      query.focus();
    } else if (event.key === "Escape" && query.value) {
      query.value = "";
      search();
    }
  });
  addEventListener("hashchange", open);
  open();
}
