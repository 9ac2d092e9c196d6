"""The rendered book in headless Chromium: every page works alone, without a kernel and without a network."""

from __future__ import annotations

import json
import pathlib
import re

import pytest

AXE = pathlib.Path(__file__).parent / "vendor/axe.min.js"
# The theme's own markup, which a page cannot change.
NOT_OURS = {"label-content-name-mismatch"}


def visit(page, url: str) -> None:
    page.goto(url, wait_until="load")
    page.evaluate("typeof MathJax === 'undefined' ? 0 : MathJax.startup.promise.then(() => 0)")
    page.evaluate("document.fonts.ready.then(() => 0)")
    page.wait_for_timeout(100)  # what scripts start late; networkidle waits five times as long, sometimes for ever


LOOK = """() => {
  const colour = (e, what) => getComputedStyle(e)[what].match(/[\\d.]+/g).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const article = document.querySelector("article") || document.body;
  return {
    math: document.querySelectorAll(".math").length,
    typeset: document.querySelectorAll("mjx-container").length,
    wrong: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
    wide: document.documentElement.scrollWidth - innerWidth,
    ground: lum(colour(document.body, "backgroundColor")),
    text: lum(colour(article, "color")),
    broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
    explores: document.querySelectorAll(".mm-explore").length,
    live: document.querySelectorAll(".mm-explore[data-live=static]").length,
    title: document.title,
  };
}"""


def problems(page, scheme: str) -> list[str]:
    """What a reader would notice on an open page."""
    seen, found = page.evaluate(LOOK), list(page.trouble)
    page.trouble.clear()
    if seen["typeset"] < seen["math"] or seen["wrong"]:
        found.append(f"math: {seen['math']} formulas, {seen['typeset']} typeset, {seen['wrong']} with an error")
    if seen["wide"] > 0:
        found.append(f"{seen['wide']} px wider than the screen")
    if seen["broken"]:
        found.append(f"images that do not load: {seen['broken']}")
    if seen["live"] != seen["explores"]:
        found.append(f"{seen['explores']} sets of sliders, {seen['live']} live")
    light, dark = sorted((seen["ground"], seen["text"]), reverse=True)
    if (light + 0.05) / (dark + 0.05) < 7 or (seen["ground"] < seen["text"]) != (scheme == "dark"):
        found.append(f"{scheme} mode: ground {seen['ground']:.2f}, text {seen['text']:.2f}")
    if not seen["title"]:
        found.append("no title")
    return found


def axe(page) -> list[str]:
    page.add_script_tag(path=AXE)
    result = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
    return [
        f"{v['id']}: {n['html'][:120]} | {(n['any'] or n['all'] or n['none'])[0]['message'][:160]}"
        for v in result["violations"] if v["id"] not in NOT_OURS
        for n in v["nodes"][:3]
    ]  # fmt: skip


def sliders(page) -> list[str]:
    """Move every slider of an open page by keyboard; the table must then say what the kernel computed for that state."""
    found = []
    for host in page.locator(".mm-explore").all():
        data = json.loads(host.locator("script[type='application/json']").text_content())
        at = [d["start"] for d in data["dims"]]
        for i, d in enumerate(data["dims"]):
            if len(d["values"]) == 1:
                continue
            step = 1 if at[i] + 1 < len(d["values"]) else -1
            slider = host.locator(f"input[data-key='{d['key']}']")
            slider.focus()
            page.keyboard.press("ArrowRight" if step == 1 else "ArrowLeft")
            at[i] += step
            state = 0
            for j, dim in enumerate(data["dims"]):
                state = state * len(dim["values"]) + at[j]
            shown = host.locator("td").all_inner_texts()
            if shown != data["cells"][state]:
                found.append(f"{data['title']}: {d['key']} at {d['values'][at[i]]} shows {shown}, not {data['cells'][state]}")
            if "figures" in data:
                label = re.search('aria-label="([^"]*)"', data["figures"][state]).group(1)
                if host.locator(".mm-figure svg").get_attribute("aria-label") != label:
                    found.append(f"{data['title']}: the figure did not follow {d['key']}")
    return found


def report(found: dict[str, list[str]]) -> str:
    return "\n" + "\n".join(f"{page}: {line}" for page, lines in found.items() for line in lines)


def with_sliders(site) -> list[str]:
    return [p for p in site.chapters if 'class="mm-explore"' in (site.folder / p).read_text(encoding="utf-8")]


def test_every_page_once(site, open_page):
    """No console error, no outside request, math typeset, images load, nothing wider than the screen."""
    page, found = open_page(), {}
    for name in site.pages:
        visit(page, f"{site.address}/{name}")
        if wrong := problems(page, "light"):
            found[name] = wrong
    assert not found, report(found)
    assert len(site.chapters) >= 4


def test_the_front_door_leads_in(site, open_page):
    page = open_page()
    page.goto(f"{site.address}/")
    page.wait_for_url("**/book/intro.html")
    assert page.trouble == []


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_the_front_page_leads_to_the_calculator(site, open_page, size):
    """High on the page: on the first two screens even of a phone."""
    page = open_page(size)
    visit(page, f"{site.address}/book/intro.html")
    link = page.locator("article a[href='calculator.html']").first
    assert link.bounding_box()["y"] < 2 * page.viewport_size["height"]
    link.click()
    page.wait_for_url("**/book/calculator.html")
    assert page.locator(".mm-explore[data-live=static]").count() == 2 and problems(page, "light") == []


def test_the_calculator_without_scripts(site, browser):
    """The tables of the starting state stay, and say what they are for."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site.address}/book/calculator.html")
    fit, fast = page.locator(".mm-explore").all()
    assert "nemotron-3-nano-30b-a3b" in fit.inner_text() and "[GB] 12" in fit.inner_text()
    assert "rtx-3060" in fast.inner_text() and "tokens/s" in fast.locator("td").last.inner_text()
    assert page.locator(".mm-explore input").count() == 0
    context.close()


def test_links_from_outputs_lead_to_pages(site, open_page):
    """A notebook's output links to notebooks; on the site these are pages."""
    page = open_page()
    visit(page, f"{site.address}/notebooks/90_predictions.html")
    links = page.locator("article .mm-card a")
    names = {link.get_attribute("href") for link in links.all()}
    assert len(names) >= 6 and all((site.folder / "notebooks" / name).is_file() for name in names)
    links.first.click()
    page.wait_for_url(f"**/notebooks/{sorted(names)[0]}")
    assert page.trouble == []


def test_sliders_move_without_a_kernel(site, open_page):
    page, found = open_page(), {}
    for name in with_sliders(site):
        visit(page, f"{site.address}/{name}")
        if wrong := sliders(page) + page.trouble:
            found[name] = wrong
    assert not found, report(found)


def test_a_slider_follows_the_mouse(site, open_page):
    page = open_page()
    visit(page, f"{site.address}/{with_sliders(site)[0]}")
    slider = page.locator(".mm-explore input").first
    for share, end in ((0.99, "max"), (0.01, "min")):
        box = slider.bounding_box()  # anew: another figure below may move the page
        slider.click(position={"x": box["width"] * share, "y": box["height"] / 2})
        page.wait_for_function(f"e => e.value === e.{end}", arg=slider.element_handle(), timeout=5000)


def test_the_book_works_as_files(site, open_page):
    """`make book` prints a file:// address: sliders and math must work there too."""
    page = open_page()
    visit(page, (site.folder / with_sliders(site)[0]).as_uri())
    assert problems(page, "light") == [] and sliders(page) == []


def test_phone(site, open_page):
    page = open_page("phone")
    visit(page, f"{site.address}/{with_sliders(site)[0]}")
    assert problems(page, "light") == []
    link = page.locator(".bd-sidebar-primary nav a").first
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    page.locator(".primary-toggle:visible").first.click()
    link.wait_for(state="visible")
    page.wait_for_function("e => e.getBoundingClientRect().x >= 0", arg=link.element_handle())
    assert page.trouble == []


def test_dark_mode(site, open_page):
    """The page is dark, and so are figures, cards and sliders on it."""
    page = open_page(scheme="dark")
    for name in with_sliders(site)[:2]:
        visit(page, f"{site.address}/{name}")
        assert problems(page, "dark") == []
        ground = page.locator(".mm-explore").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert max(map(int, re.findall(r"\d+", ground)[:3])) < 80
    pictured = next(p for p in site.chapters if "cell_output" in (t := (site.folder / p).read_text()) and "<img" in t)
    visit(page, f"{site.address}/{pictured}")
    assert "invert" in page.locator(".cell_output img").first.evaluate("e => getComputedStyle(e).filter")


def test_search_finds_a_word(site, open_page):
    page = open_page()
    visit(page, f"{site.address}/search.html?q=attention")
    page.wait_for_selector("#search-results li")
    assert page.trouble == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_sample(site, open_page, scheme):
    page = open_page(scheme=scheme)
    for name in ("book/intro.html", "book/cards.html", *with_sliders(site)[:2]):
        visit(page, f"{site.address}/{name}")
        assert axe(page) == [], name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_every_page_at_every_size_and_theme(site, open_page, size, scheme):
    page, found = open_page(size, scheme), {}
    for name in site.pages:
        visit(page, f"{site.address}/{name}")
        wrong = problems(page, scheme) + sliders(page)
        if name in site.chapters:
            wrong += axe(page)
        if wrong:
            found[name] = wrong
    assert not found, report(found)
