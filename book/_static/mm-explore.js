// Makes <div class="mm-explore">, a plain table plus the JSON of every state, live. No dependency, no network.
(() => {
  let count = 0;
  const make = (tag, props = {}, ...children) => {
    const e = Object.assign(document.createElement(tag), props);
    e.append(...children);
    return e;
  };

  function upgrade(host) {
    const data = JSON.parse(host.querySelector("script[type='application/json']").textContent);
    const at = data.dims.map((d) => d.start);
    const cells = [...host.querySelectorAll("td")];
    const figure = host.querySelector(".mm-figure");
    const status = make("p", { className: "visually-hidden" });
    status.setAttribute("role", "status");

    const show = (speak) => {
      let state = 0;
      data.dims.forEach((d, i) => { state = state * d.values.length + at[i]; });
      data.cells[state].forEach((text, i) => { cells[i].textContent = text; });
      if (figure && data.figures) figure.innerHTML = data.figures[state];
      if (speak) status.textContent = data.rows.map((row, i) => `${row}: ${data.cells[state][i]}`).join("; ");
    };

    const form = make("div", { className: "mm-controls" });
    data.dims.forEach((d, i) => {
      const id = `mm-explore-${count++}`;
      const value = make("output", { htmlFor: id });
      const input = make("input", { type: "range", id, min: 0, max: d.values.length - 1, step: 1 });
      input.value = at[i];                       // after min and max, or the browser clamps it
      input.dataset.key = d.key;
      const put = () => {
        value.textContent = d.values[at[i]];
        input.setAttribute("aria-valuetext", d.values[at[i]]);
      };
      input.addEventListener("input", () => { at[i] = Number(input.value); put(); show(false); });
      input.addEventListener("change", () => show(true));
      put();
      form.append(make("div", {}, make("label", { htmlFor: id }, d.label), input, value));
    });
    // room for the longest value, so that nothing moves while a slider does
    const longest = Math.max(...data.dims.flatMap((d) => d.values.map((v) => v.length)));
    form.style.setProperty("--mm-value", `${Math.min(Math.max(longest + 1, 6), 26)}ch`);
    host.querySelector(".mm-lead").replaceChildren(make("strong", {}, data.title));
    host.querySelector(".mm-lead").after(form);
    host.append(status);
    host.dataset.live = "static";
  }

  document.querySelectorAll(".mm-explore").forEach(upgrade);
})();
