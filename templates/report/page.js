const find = (selector) => document.querySelector(selector);
const words = find("#search"), status = find("#status"), op = find("#op"), backend = find("#backend");
const groups = [...document.querySelectorAll("details.group")].map((group) => ({
  group,
  rows: [...group.querySelectorAll("details.case")].map((row) => [row, row.textContent.toLowerCase()]),
}));
const FEW = 300; // rows that are opened without being asked for

function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = !wanted.length && !status.value;
  let total = 0;
  const shown = groups.map(({ group, rows }) => {
    const data = group.dataset, head = `${data.op} ${data.backend} `.toLowerCase();
    const chosen = (!op.value || data.op === op.value) && (!backend.value || data.backend === backend.value);
    let count = 0;
    for (const [row, text] of rows) {
      const visible = chosen && (!status.value || row.dataset.status === status.value) &&
        wanted.every((word) => head.includes(word) || text.includes(word));
      row.hidden = !visible;
      count += visible;
    }
    group.hidden = !count;
    total += count;
    return count;
  });
  groups.forEach(({ group }, i) => { group.open = shown[i] > 0 && !all && total <= FEW; });
  find("#shown").textContent = `${total.toLocaleString("en")} shown`;
}

function reveal() {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (target && target.matches("details")) {
    if (target.hidden) {
      for (const choice of [words, status, op, backend]) choice.value = "";
      filter();
    }
    target.open = true;
    target.scrollIntoView();
  }
}

let waiting;
words.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
for (const choice of [status, op, backend]) choice.addEventListener("change", filter);
addEventListener("hashchange", reveal);
find("#tools").hidden = false;
reveal();
