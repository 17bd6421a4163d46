"""The page of `python -m hfkv inspect` in a real browser: counts, keys, mouse, themes, narrow screens, no requests."""

from __future__ import annotations

import pytest
import torch
from browser import Browser, find_browser
from test_inspection import CONFIG, NASTY, hybrid_model, text_ids, tiny_model
from tiny import byte_tokenizer

from hfkv.inspection import examine, write_page
from hfkv.report import HIGH, LOW, PRUNED, WINDOW

EXECUTABLE = find_browser()
PLACES = {"high": HIGH, "low": LOW, "window": WINDOW, "pruned": PRUNED}
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium, Chrome or Edge is on PATH")

LEGEND = (
    "Object.fromEntries([...document.querySelectorAll('#legend li')]"
    ".map((x) => [x.dataset.place, Number(x.querySelector('b').textContent.replace(/,/g, ''))]))"
)
COLOURED = (
    "(() => { const n = {}; for (const s of document.querySelectorAll('#tokens span:not([hidden])'))"
    " n[s.classList[0]] = (n[s.classList[0]] || 0) + 1; return n; })()"
)


@pytest.fixture(scope="module")
def made():
    return examine(tiny_model(), byte_tokenizer(), text_ids(330), CONFIG, generate=40, later=12)


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    return write_page(made, tmp_path_factory.mktemp("page") / "inspect.html")


@pytest.fixture(scope="module")
def shared():
    with Browser(EXECUTABLE) as browser:
        yield browser


@pytest.fixture
def browser(shared):
    """The browser, which after each test must have met no error and asked for nothing but the page."""
    shared.errors.clear()
    shared.requests.clear()
    shared.appear()
    yield shared
    assert shared.errors == []
    assert all(url.startswith(("file:", "data:", "about:")) for url in shared.requests)
    assert len({url.split("#")[0] for url in shared.requests if url.startswith("file:")}) == 1


def pick(browser, name, value):
    browser.run(
        f"(() => {{ const list = document.getElementById('{name}'); list.value = {value!r};"
        "list.dispatchEvent(new Event('change')); })()"
    )


def counted(tiers: torch.Tensor) -> dict[str, int]:
    found = {name: int((tiers == place).sum()) for name, place in PLACES.items()}
    return {name: count for name, count in found.items() if count or name == "high"}


def heads_text(browser) -> list[list[str]]:
    """The table of the token pointed at: [head, place, score, attention] each."""
    return browser.run(
        "[...document.querySelectorAll('#token tbody tr')].map((x) => [...x.cells].map((y) => y.textContent))"
    )


@pytest.mark.parametrize("moment", [0, 1])
def test_counts_after_choosing_layer_and_head(browser, page, made, moment):
    browser.open(page)
    pick(browser, "moment", moment)
    layers = made.moments[moment].layers
    every = torch.cat([view.tier for view in layers.values()])
    assert browser.run(LEGEND) == counted(every)
    for layer, head in ((0, 0), (1, 2), (2, 1)):
        pick(browser, "layer", layer)
        pick(browser, "head", head)
        want = counted(layers[layer].tier[head])
        assert browser.run(LEGEND) == want
        assert browser.run(COLOURED) == {name: count for name, count in want.items() if count}
        assert browser.run("document.querySelector('#figures h3').textContent") == f"Layer {layer}, head {head}"
        pressed = "[...document.querySelectorAll('#heat [aria-pressed=true]')].map((x) => x.choice)"
        assert browser.run(pressed) == [[layer, head]]
    pick(browser, "layer", -1)
    assert browser.run(LEGEND) == counted(torch.cat([view.tier[1:2] for view in layers.values()]))


def test_shares_of_all_heads_are_drawn_under_every_token(browser, page, made):
    browser.open(page, "#cache=1")
    every = torch.cat([view.tier for view in made.moments[1].layers.values()])
    ends = browser.run(
        "spans.filter((s) => !s.hidden).map((s) =>"
        " ['--a', '--b', '--c'].map((name) => parseFloat(s.style.getPropertyValue(name))))"
    )
    parts = torch.stack([(every == place).float().mean(0) for place in (HIGH, LOW, WINDOW)], 1).cumsum(1)
    torch.testing.assert_close(torch.tensor(ends) / 100, parts, rtol=0, atol=1e-5)
    assert browser.run("document.querySelectorAll('#tokens .gone').length") == int((every == PRUNED).all(0).sum())


def test_heat_map_cells_choose_and_show_the_attention_kept(browser, page, made):
    browser.open(page)
    cells = browser.run("[...document.querySelectorAll('#heat td button')].map((x) => [x.choice, x.title])")
    assert len(cells) == 9
    for (layer, head), title in cells:
        kept = 1 - float(made.moments[1].layers[layer].mass(PRUNED)[head])
        assert title.endswith(f"attention kept {100 * kept:.1f}\u00a0%")
    browser.run("document.querySelectorAll('#heat td button')[4].click()")
    assert browser.run("location.hash") == "#cache=1&layer=1&head=1"
    browser.run("document.querySelectorAll('#heat td button')[4].focus()")
    browser.press("ArrowRight", 39)
    browser.press("ArrowDown", 40)
    assert browser.run("document.activeElement.choice") == [2, 2]
    browser.press("ArrowDown", 40)  # there is none below
    assert browser.run("document.activeElement.choice") == [2, 2]
    assert browser.run("document.querySelectorAll('#heat [tabindex=\"0\"]').length") == 1


def test_metrics_change_the_heat_map(browser, page, made):
    browser.open(page)
    for metric, place in (("tokensHigh", HIGH), ("tokensLow", LOW), ("tokensPruned", PRUNED)):
        pick(browser, "metric", metric)
        shown = browser.run("[...document.querySelectorAll('#heat td button')].map((x) => [x.choice, x.title])")
        for (layer, head), title in shown:
            share = float((made.moments[1].layers[layer].tier[head] == place).float().mean())
            assert title.endswith(f" {100 * share:.1f}\u00a0%") or share == 0


def test_a_token_shows_score_and_tier_of_every_head(browser, page, made):
    browser.open(page, "#cache=1&layer=1&head=0")
    view, before = made.moments[1].layers[1], made.moments[0].layers[1]
    names = {place: name for name, place in PLACES.items()}
    for token in (3, 200, 310, 365):
        browser.run(f"spans[{token}].scrollIntoView({{block: 'center'}})")
        browser.run(f"spans[{token}].id = 'wanted'")
        browser.mouse("#wanted")
        browser.run("document.getElementById('wanted').removeAttribute('id')")
        assert f"position {token} of 370" in browser.run("document.getElementById('token').textContent")
        for head, (number, place, score, attention) in enumerate(heads_text(browser)):
            now, was = (int(x.tier[head, token]) if token < x.tier.shape[1] else None for x in (view, before))
            assert number == str(head)
            assert place == names[now] if was in (now, None) else f"{names[was]} → {names[now]}"
            stored = float(view.score[head, token])
            assert score == "none" if stored != stored else float(score) == pytest.approx(stored, rel=0.01)
            exact = float(view.attention[head, token]) * 370
            assert attention.startswith("<") or float(attention) == pytest.approx(exact, rel=0.05, abs=0.0005)
    assert len(heads_text(browser)) == 3


def test_keys_move_pin_and_let_go(browser, page):
    browser.open(page, "#cache=1&layer=0&head=0")
    browser.run("spans[0].focus()")
    for key, code, token in (
        ("ArrowRight", 39, 1),
        ("ArrowRight", 39, 2),
        ("ArrowLeft", 37, 1),
        ("End", 35, 369),
        ("PageUp", 33, 319),
        ("Home", 36, 0),
        ("PageDown", 34, 50),
    ):
        browser.press(key, code)
        assert browser.run("[state.token, document.activeElement.number]") == [token, token]
    browser.press("ArrowDown", 40)
    below = browser.run("state.token")
    assert browser.run(f"spans[{below}].getClientRects()[0].top > spans[50].getClientRects()[0].top")
    browser.press("ArrowUp", 38)
    lines = f"[50, {browser.run('state.token')}].map((i) => spans[i].getClientRects()[0].top)"
    assert len(set(browser.run(lines))) == 1
    assert browser.run("document.querySelectorAll('#tokens [tabindex=\"0\"]').length") == 1
    label = browser.run("document.activeElement.getAttribute('aria-label')")
    assert f"position {browser.run('state.token')}: " in label
    browser.press("Enter", 13)
    assert browser.run("state.pinned") is True
    here = browser.run("state.token")
    browser.mouse("#tokens span")
    assert browser.run("state.token") == here
    browser.press("Escape", 27)
    assert browser.run("state.pinned") is False


def test_every_control_can_be_reached_and_has_a_name(browser, page):
    browser.open(page)
    seen = []
    for _ in range(40):
        browser.press("Tab", 9)
        name = browser.run(
            "(() => { const x = document.activeElement; if (x === document.body) return null;"
            " const named = x.labels && x.labels[0] || x, area = x.closest('[id]');"
            " return [area ? area.id : x.tagName, (x.getAttribute('aria-label') || named.textContent).trim()]; })()"
        )
        if name is None:
            break
        assert name[1], name
        seen.append(name[0])
    order = ["metric", "heat", "moment", "layer", "head", "tokens"]
    assert [name for name in dict.fromkeys(seen) if name in order] == order


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 1280])
def test_nothing_is_wider_than_the_screen(browser, page, width, scheme):
    browser.appear(width, 800, scheme, mobile=width < 800)
    browser.open(page, "#layer=1")
    browser.run("focusToken(40, true)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    dark = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((c) => c < 60)")
    assert dark == (scheme == "dark")


def test_text_of_any_kind_shows_as_it_is(browser, tmp_path):
    ids = byte_tokenizer()(NASTY)["input_ids"]
    made = examine(tiny_model(), byte_tokenizer(), ids, CONFIG, later=4)
    browser.open(write_page(made, tmp_path / "nasty.html"))
    shown = browser.run("spans.map((s) => s.textContent).join('')")
    for hidden in "\r\x00\x01\u202e\u202c\u200d":  # drawn as a sign
        assert hidden in NASTY
    assert shown == "".join(c for c in NASTY if c not in "\r\x00\x01\u202e\u202c\u200d")
    signs = browser.run("[...document.querySelectorAll('#tokens i')].map((x) => x.dataset.s)")
    assert {"↵", "⇥", "U+000D", "U+0000", "U+0001", "U+202E", "U+202C", "U+200D"} == set(signs)
    assert browser.run("document.scripts.length") == 2
    first = byte_tokenizer()(NASTY.split("日")[0])["input_ids"]
    browser.run(f"focusToken({len(first)}, true)")
    assert "Some bytes of “日”" in browser.run("document.getElementById('token').textContent")


def test_layers_that_are_not_compressed_are_hatched_and_explained(browser, tmp_path):
    made = examine(hybrid_model(), byte_tokenizer(), text_ids(120), CONFIG, later=10)
    browser.open(write_page(made, tmp_path / "hybrid.html"), "#layer=3&head=1")
    assert browser.run("document.querySelectorAll('#heat td.none').length") == 4
    assert "Layers 1, 2:" in browser.run("document.getElementById('plain').textContent")
    assert browser.run("document.querySelector('#figures h3').textContent") == "Layer 3, head 1"
    assert browser.run(LEGEND) == counted(made.moments[0].layers[3].tier[1])


def test_the_summary_says_what_the_report_says(browser, page, made):
    browser.open(page)
    report = made.moments[1].report
    text = browser.run("document.getElementById('summary').textContent")
    assert f"{report.ratio:.3f}" in text and "3 of 3" in text and "370" in text
    total = browser.run(
        "[...document.querySelectorAll('#bytes tbody tr')]"
        ".reduce((n, x) => n + Number(x.cells[1].textContent.replace(/,/g, '')), 0)"
    )
    assert total == report.physical_bytes
    assert browser.run("document.getElementById('config').textContent") == CONFIG.to_json()
    rows = browser.run("document.querySelectorAll('#all tbody tr').length")
    assert rows == 9
