"use strict";
// Tables sort and filter, figures answer the pointer and the arrow keys; nothing here draws or adds data.
(() => {
  const tip = document.getElementById("tip");
  const hints = new WeakMap(); // titles of marks, which a browser would show a second time
  const value = (cell) => Number(cell.dataset.v ?? cell.textContent.replace(/[,\s%]/g, "").replace("−", "-"));
  const number = (cell) => cell.textContent === "–" ? null : value(cell);

  function point(x, y, title, text) {
    const head = document.createElement("b");
    head.textContent = title;
    tip.replaceChildren(head, text);
    tip.classList.add("on");
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), innerWidth - box.width - 8);
    const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
    tip.style.transform = `translate(${left}px, ${top}px)`;
  }
  const unpoint = () => tip.classList.remove("on");
  addEventListener("scroll", unpoint, { passive: true, capture: true });

  function hintOf(mark) {
    const title = mark.querySelector?.(":scope > title");
    if (title) {
      hints.set(mark, title.textContent);
      title.remove();
    }
    return hints.get(mark);
  }
  document.addEventListener("pointermove", (event) => {
    const hint = event.target.closest?.("svg path, svg rect") && hintOf(event.target);
    if (hint) {
      const at = hint.lastIndexOf(": ");
      point(event.clientX, event.clientY, hint.slice(at < 0 ? 0 : at + 2), hint.slice(0, Math.max(0, at)));
    } else if (!event.target.closest?.("[data-says], [data-e]")) unpoint();
  });

  function sortable(table) {
    const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => {
      const words = head.classList.contains("t"), was = head.getAttribute("aria-sort");
      const up = was ? was === "descending" : words; // numbers begin with the largest
      const keys = new Map(rows.map((row) => [row, words ? row.cells[at].textContent : number(row.cells[at])]));
      const sorted = [...rows].sort((a, b) => {
        const one = keys.get(a), other = keys.get(b);
        if (one === null || other === null) return (one === null) - (other === null);
        const less = words ? compare(one, other) : one - other;
        return up ? less : -less;
      });
      body.append(...sorted);
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    }));
    const filter = table.closest(".card").querySelector("input[type=search]");
    if (!filter) return;
    filter.hidden = false;
    const names = rows.map((row) => row.cells[0].textContent.toLowerCase());
    filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      rows.forEach((row, at) => { row.hidden = !names[at].includes(wanted); });
    });
  }

  // Figures whose marks have `data-e` show rows of the article's linked table.
  function linked(article) {
    const table = article.querySelector("table.linked");
    if (!table) return;
    const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
    const maps = [...article.querySelectorAll("svg")].filter((svg) => svg.querySelector(".cells [data-e]"));
    const cells = maps.map((svg) => [...svg.querySelectorAll(".cells [data-e]")]);
    const name = (at) => rows[at].cells[0].textContent;
    const where = maps.length ? "on the map or in the table" : "in the table";
    const charts = [...article.querySelectorAll("svg[data-says]")].map((svg) => chart(svg, where));

    function choose(at) {
      rows.forEach((row, each) => row.classList.toggle("on", each === at));
      cells.flat().forEach((cell) => cell.classList.toggle("on", Number(cell.dataset.e) === at));
      charts.forEach((each) => each.choose(at, name(at)));
    }
    rows.forEach((row, at) => row.addEventListener("click", () => choose(at)));
    maps.forEach((svg, which) => {
      svg.closest(".card").classList.add("chooses");
      const shown = { column: heads.findIndex((head) => head.textContent === svg.dataset.what) };
      const told = (at) => `${heads[shown.column]?.textContent ?? svg.dataset.what} ${rows[at].cells[Math.max(shown.column, 1)].textContent}`;
      svg.addEventListener("pointermove", (event) => {
        const at = event.target.dataset?.e;
        if (at !== undefined) point(event.clientX, event.clientY, told(at), name(at));
      });
      svg.addEventListener("pointerleave", unpoint);
      svg.addEventListener("click", (event) => {
        if (event.target.dataset?.e !== undefined) choose(Number(event.target.dataset.e));
      });
      arrows(svg, cells[which], (cell) => {
        const at = Number(cell.dataset.e), box = cell.getBoundingClientRect();
        choose(at);
        point(box.right, box.bottom, told(at), name(at));
      });
      if (which === 0) metrics(article, svg, cells[which], rows, heads, shown);
    });
  }

  function arrows(svg, cells, go) {
    const place = (cell) => cell.getAttribute("d").match(/^M([\d.]+) ([\d.]+)/).slice(1).map(Number);
    const places = cells.map(place), steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1] };
    svg.closest(".scroll").addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      const at = cells.findIndex((cell) => cell.classList.contains("on"));
      if (at < 0) return go(cells[0]);
      const [along, by] = step, here = places[at];
      let best = -1, nearest = Infinity;
      places.forEach((each, other) => {
        const far = (each[along] - here[along]) * by, off = Math.abs(each[1 - along] - here[1 - along]);
        if (far > 0 && far + 1000 * off < nearest) [best, nearest] = [other, far + 1000 * off];
      });
      if (best >= 0) go(cells[best]);
    });
  }

  // The reader may colour a map by any column of numbers.
  function metrics(article, svg, cells, rows, heads, shown) {
    const select = svg.closest(".card").querySelector("select.metric");
    if (!select || shown.column < 0) return;
    heads.forEach((head, at) => {
      if (at && !head.classList.contains("t")) select.add(new Option(head.textContent, at, false, at === shown.column));
    });
    select.hidden = false;
    const hint = svg.closest(".card").querySelector(".hint"), levels = svg.querySelectorAll("rect[class^=q]").length;
    select.addEventListener("change", () => {
      shown.column = Number(select.value);
      const known = rows.map((row) => row.cells[shown.column]).filter((cell) => number(cell) !== null);
      const least = known.reduce((a, b) => number(b) < number(a) ? b : a, known[0]);
      const most = known.reduce((a, b) => number(b) > number(a) ? b : a, known[0]);
      const low = known.length ? number(least) : 0, high = known.length ? number(most) : 0;
      cells.forEach((cell) => {
        const here = number(rows[cell.dataset.e].cells[shown.column]);
        const part = least.textContent !== most.textContent ? (here - low) / (high - low) : here ? .5 : 0;
        const on = cell.classList.contains("on") ? " on" : "";
        cell.setAttribute("class", (here === null ? "none" : `q${Math.round(part * (levels - 1))}`) + on);
      });
      svg.querySelector(".low").textContent = least?.textContent ?? "–";
      svg.querySelector(".high").textContent = most?.textContent ?? "–";
      if (hint) hint.textContent = heads[shown.column].firstElementChild.title;
    });
  }

  // A chart with a line for each row: the chosen one in front, and the values of its points under the pointer.
  function chart(svg, where) {
    const NS = "http://www.w3.org/2000/svg", group = svg.querySelector(".lines");
    const hint = svg.closest(".card").querySelector(".hint");
    const [left, top, width, height] = svg.dataset.box.split(" ").map(Number);
    const axis = (text) => {
      const [low, high, log] = text.split(" ").map(Number);
      return log ? (part) => 10 ** (Math.log10(low) + part * Math.log10(high / low)) : (part) => low + part * (high - low);
    };
    const across = axis(svg.dataset.x), up = axis(svg.dataset.y);
    const lines = new Map([...group.querySelectorAll("[data-e]")].map((line) => [Number(line.dataset.e), line]));
    const front = group.querySelector(".chosen") ?? group.appendChild(lines.values().next().value.cloneNode());
    front.removeAttribute("data-e");
    front.setAttribute("class", "s chosen");
    const dot = document.createElementNS(NS, "circle");
    dot.setAttribute("class", "dot");
    dot.setAttribute("r", 4.5);
    dot.setAttribute("visibility", "hidden");
    svg.append(dot);
    let points = [], named = "";
    function read() {
      const numbers = front.getAttribute("d").match(/-?\d+/g).map(Number);
      points = [];
      for (let at = 0, x = 0, y = 0; at + 1 < numbers.length; at += 2) {
        x += numbers[at];
        y += numbers[at + 1];
        points.push([x / 10, y / 10]);
      }
    }
    read();
    const show = (number) => String(Number(number.toPrecision(3)));
    svg.addEventListener("pointermove", (event) => {
      const bounds = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / bounds.width;
      const x = (event.clientX - bounds.left) * scale;
      const nearest = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      dot.setAttribute("cx", nearest[0]);
      dot.setAttribute("cy", nearest[1]);
      dot.setAttribute("visibility", "visible");
      const told = svg.dataset.says.replace("{x}", String(Math.round(across((nearest[0] - left) / width))))
        .replace("{y}", show(up(1 - (nearest[1] - top) / height)));
      point(event.clientX, event.clientY, told, named);
    });
    svg.addEventListener("pointerleave", () => { unpoint(); dot.setAttribute("visibility", "hidden"); });
    return {
      choose(at, name) {
        named = name;
        hint.textContent = `${name} in front of the others; choose another one ${where}`;
        if (lines.has(at)) front.setAttribute("d", lines.get(at).getAttribute("d"));
        read();
      },
    };
  }

  document.querySelectorAll("table.linked, table.sorted").forEach(sortable);
  document.querySelectorAll("article").forEach((article) => {
    linked(article);
    const first = article.querySelector("table.linked")?.tBodies[0].rows[Number(article.querySelector("[data-chosen]")?.dataset.chosen ?? -1)];
    first?.click();
  });
})();
