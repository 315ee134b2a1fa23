"""All six tabs as a reader without a mouse meets them: axe's rules, the path of the keyboard, nothing that scrolls sideways, a console that stays silent."""
from contextlib import contextmanager

import pytest
from browser import quiet_page

TABS = ("Listen", "Compare", "Cost", "Stream", "LiGRU", "Study")
SERIOUS = ("serious", "critical")
SHOWN = dict(Listen="#listen-view .essl-view[data-shown]", Compare="#curves-view .essl-view[data-shown]", Cost="#cost-view .essl-view[data-shown]",
             Stream="#live-view .essl-view[data-shown]", LiGRU="#gru-view .essl-view[data-shown]", Study="#health-view .essl-view[data-shown]")


@pytest.fixture(scope="module", params=[(1440, "light"), (390, "dark")], ids=["wide-light", "phone-dark"])
def page(request, tmp_path_factory):
    width, scheme = request.param
    with quiet_page(tmp_path_factory.mktemp("uploads"), width, color_scheme=scheme) as page:
        yield page


def open_tab(page, name: str):
    page.click(f"button[role=tab]:has-text('{name}')")
    page.wait_for_selector(SHOWN[name])
    page.wait_for_function("() => !document.querySelector('[role=tabpanel] .essl-view.waiting')")


@pytest.mark.parametrize("name", TABS)
def test_axe_has_no_serious_finding(page, name):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python")
    open_tab(page, name)
    found = [v for v in axe.Axe().run(page).response["violations"] if v["impact"] in SERIOUS]
    assert not found, "\n".join(f"{v['id']}: {v['help']}\n  " + "\n  ".join(n["html"][:200] + " | " + n["failureSummary"].replace("\n", " ")[:300] for n in v["nodes"][:4]) for v in found)


def test_the_tabs_by_arrow_keys(page):
    tabs = page.locator("[role=tablist] button[role=tab]:visible")
    chosen = lambda: page.locator("button[role=tab][aria-selected=true]").first.inner_text().strip()
    open_tab(page, TABS[0])
    tabs.first.focus()
    seen = [chosen()]
    for _ in TABS[1:]:
        page.keyboard.press("ArrowRight")
        seen.append(chosen())
        assert page.evaluate("document.activeElement.textContent.trim()") == seen[-1]
    assert tuple(seen) == TABS
    page.keyboard.press("Home")
    assert chosen() == TABS[0]
    page.keyboard.press("ArrowLeft")
    assert chosen() == TABS[-1]


# without the families of a figure, which are made anew whenever it is drawn (and keep the focus)
CONTROLS = """() => [...document.querySelectorAll('[role=tabpanel] :is(button, input, select, textarea, a[href])')].filter(e => {
  const r = e.getBoundingClientRect(), s = getComputedStyle(e);
  return r.width > 1 && r.height > 1 && s.visibility === 'visible' && !e.disabled && e.tabIndex >= 0 && !e.closest('[hidden], [aria-hidden=true], .essl-key') && e.type !== 'radio';
}).map((e, i) => { e.dataset.control = i; return e.outerHTML.slice(0, 200); })"""
FOCUSED = "() => document.activeElement === document.body ? null : document.activeElement.dataset.control || ''"


@pytest.mark.parametrize("name", TABS)
def test_every_control_is_reached_by_tab(page, name):
    open_tab(page, name)
    wanted, reached = page.evaluate(CONTROLS), []
    page.locator(f"button[role=tab]:has-text('{name}'):visible").first.focus()
    for _ in range(2 * len(wanted) + 40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
    first_out = reached.index(None) if None in reached else len(reached)
    lost = [html for i, html in enumerate(wanted) if str(i) not in reached[:first_out]]
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize("name", TABS)
def test_nothing_scrolls_sideways(page, name):
    open_tab(page, name)
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0


def test_light_or_dark_is_remembered(page):
    dark = lambda p: p.evaluate("document.body.classList.contains('dark')")
    for _ in ("there", "back"):
        was = dark(page)
        page.click(".essl-head button")
        later = page.context.new_page()
        later.goto(page.url)
        later.wait_for_selector(SHOWN["Listen"])
        assert dark(page) != was and dark(later) == dark(page)
        later.close()
