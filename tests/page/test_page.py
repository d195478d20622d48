"""The page in a real browser; screenshots go to build/screenshots."""

import json
import re
import signal
from pathlib import Path

import pytest

from persona_plug.data.history import HistoryItem
from tests.page.browser import chromium, demo

pytestmark = [pytest.mark.services, pytest.mark.slow]

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
TABS = ("Ask", "History", "Report")
EVIL = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>'


@pytest.fixture(scope="module")
def served(make_plug, people, tmp_path_factory):
    """A page of a plug for free text with a report, and a store with ann, bob, eve and two dozen others."""
    import numpy as np

    from persona_plug.fit.plots import plot_lift, plot_loss
    from persona_plug.fit.report import FitReport
    from persona_plug.measure.contrasts import Contrast
    from persona_plug.measure.stats import Interval

    folder = tmp_path_factory.mktemp("demo")
    make_plug(differ=True).save_pretrained(folder / "plug")
    lift = Contrast("plug", "plug_shuffled", "nll", 0.2, 0.1, 0.3)
    metrics = {name: dict.fromkeys(("nll", "rouge-1", "rouge-L"), Interval(1.0, 0.9, 1.1)) for name in ("none", "plug")}
    FitReport(metrics, [lift], 5, 2, ["a note"]).save(folder / "plug")
    plot_loss([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}], folder / "plug" / "loss.png")
    from persona_plug.data.history import Example

    plot_lift(np.array([0.1, 0.2]), [Example("a", "x", "y"), Example("b", "x", "y")], folder / "plug" / "lift.png")
    users = {"ann": people.ann, "bob": people.bob, "eve": people.eve}
    users |= {f"user-{i:02}": [HistoryItem(f"text {i * 37 % 11}", f"answer {i}")] for i in range(24)}
    rows = [{"user_id": u, "input": i.input, "output": i.output} for u, items in users.items() for i in items]
    data = folder / "events.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    with demo(folder / "plug", folder / "run", "--data", str(data)) as (address, _, outside):
        yield address, outside


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    SHOTS.mkdir(parents=True, exist_ok=True)
    with chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def page(served, browser):
    """A fresh page on the served demo; an error in the browser's console fails the test."""
    yield from open_page(browser, served[0])


def open_page(browser, address, width=1280, begins="ann: 5 items."):
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": 900})
    page.set_default_timeout(60_000)
    page.asked, wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.locator("#chosen").get_by_text(begins).wait_for()  # the server has chosen: it does not choose again
    yield page
    page.close()
    assert not wrong


def user(page):
    return page.get_by_role("combobox", name="User", exact=True)


def choose(page, name):
    user(page).fill(name)
    user(page).press("Enter")
    page.locator("#chosen").get_by_text(re.compile(rf"^{re.escape(name)}( is new)?:")).wait_for()


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def add(page, text):
    tab(page, "History")
    page.get_by_role("textbox", name="Paste items").fill(text)
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#added .good, #added .bad").wait_for()


def ask(page, request):
    tab(page, "Ask")
    page.get_by_role("textbox", name="Request").fill(request)
    page.get_by_role("button", name="Ask").click()
    page.locator("#cards [aria-busy=false]").wait_for()
    page.locator("#cards .numbers").nth(1).wait_for()
    page.locator("#weights .pp").wait_for()


def shot(page, name):
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def test_four_answers_and_what_weighed_how_much(page):
    choose(page, "bob")
    # The cards say what is under way; a tiny LLM is too quick to be caught at it, so the page is watched.
    page.evaluate("""() => { window.busy = new Set(); new MutationObserver(() => {
        const text = document.querySelector('#cards').innerText;
        if (text.includes('Answering')) window.busy.add((text.match(/tokens read/g) || []).length);
    }).observe(document.querySelector('#cards'), {subtree: true, childList: true, characterData: true}); }""")
    ask(page, "rate this")
    for title in ("LLM alone", "Few-shot", "Another user: ann", "This user: bob"):
        card = page.get_by_role("region", name=title)
        assert re.search(r"\d+ tokens read, \d+ written, \d+\.\d\d s", card.inner_text()), title
    rows = page.locator("#weights tbody tr")
    assert rows.count() == 3
    shares = [float(text.rstrip("%")) for text in page.locator("#weights .bar").all_inner_texts()[1:]]
    widths = [box["width"] for box in (bar.bounding_box() for bar in page.locator("#weights .bar span").all())]
    assert shares == sorted(shares, reverse=True)
    assert all(w / widths[0] == pytest.approx(s / shares[0], abs=0.05) for w, s in zip(widths, shares, strict=True))
    assert "rate the cake" in page.locator("#weights").inner_text()
    assert page.evaluate("[...window.busy].length") > 0
    shot(page, "ask")


def test_another_user_clears_the_answers(page):
    choose(page, "bob")
    ask(page, "rate this")
    choose(page, "eve")
    page.locator("#cards").get_by_text("No answer yet").first.wait_for()
    assert page.locator("#weights").inner_text().strip() == ""


def test_new_user_from_pasted_lines(page):
    choose(page, "zoe")
    ask(page, "hello")
    assert "a new user gets this answer" in page.get_by_role("region", name="This user: zoe").inner_text()
    assert "The user has no items to show yet" in page.get_by_role("region", name="Few-shot").inner_text()
    add(page, 'What about tea? -> Yes, please!\nI never liked mornings\n{"input": "a", "output": "b"}')
    assert "3 new items." in page.locator("#added").inner_text()
    assert page.get_by_role("textbox", name="Paste items").input_value() == ""
    page.locator("#items").get_by_text("Yes, please!").wait_for()
    assert page.locator("#items tbody tr").count() == 3
    shot(page, "history")


def test_bad_line_is_named_and_nothing_is_lost(page):
    choose(page, "yan")
    text = 'a good line\n{"input": "x"}'
    add(page, text)
    assert "pasted text, line 2: field 'output' must be a text" in page.locator("#added [role=alert]").inner_text()
    assert page.get_by_role("textbox", name="Paste items").input_value() == text
    assert "No items of yan yet" in page.locator("#items").inner_text()
    shot(page, "bad-line")


def test_upload_and_bad_upload(page, tmp_path):
    choose(page, "uma")
    tab(page, "History")
    file = tmp_path / "mine.jsonl"
    file.write_text('{"input": "x", "output": "first"}\n{"input": "x", "output": [7]}\n')
    page.locator("#file input[type=file]").set_input_files(file)
    page.get_by_text("mine.jsonl").first.wait_for()
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#added [role=alert]").wait_for()
    assert (
        page.locator("#added").inner_text().strip()
        == "mine.jsonl:2: field 'output' must be a text or a number, got [7]"
    )
    assert "No items of uma yet" in page.locator("#items").inner_text()
    shot(page, "bad-upload")
    page.get_by_role("button", name="Clear").click()
    file.write_text('{"input": "x", "output": "first"}\n{"input": "x", "output": "second"}\n')
    page.locator("#file input[type=file]").set_input_files(file)
    page.get_by_text("mine.jsonl").first.wait_for()
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator("#added [role=status]").wait_for()
    assert page.locator("#items tbody tr").count() == 2


def test_what_users_write_is_shown_and_not_run(page):
    choose(page, EVIL)
    add(page, f"{EVIL} -> {EVIL}")
    ask(page, EVIL)
    assert "onerror=" in page.locator("#style").text_content()
    tab(page, "History")
    assert EVIL in page.locator("#items td").first.text_content()
    assert page.evaluate("window.harmed") is None
    tab(page, "History")
    forget(page)
    assert page.evaluate("window.harmed") is None


def test_a_user_and_three_requests_are_there_at_once(page):
    assert page.locator("#examples input").count() == 3
    request = page.get_by_role("textbox", name="Request")
    assert request.input_value() == page.locator("#examples label").first.inner_text() == "rate the cake"
    page.locator("#examples label").nth(1).click()
    page.wait_for_function("document.querySelector('#request textarea').value === 'Grüße aus Köln'")
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("region", name="This user: ann").get_by_text("tokens read").wait_for()
    assert "Marked words came from" in page.content()
    shot(page, "begin")


def test_own_messages_are_tried_at_once(page):
    mine = page.get_by_role("textbox", name="Try it as yourself")
    for text in ("Servus,\nall fine 🌳\n\nServus,\nall good 🌳\n\nServus,\nall well 🌳", "Moin 🌊\nMoin Ida 🌊"):
        mine.fill(text)
        mine.press("Enter")
        page.get_by_role("region", name="This user: you").get_by_text("tokens read").wait_for()
        page.get_by_role("region", name="LLM alone").get_by_text("tokens read").wait_for()
        sign = text[-1]
        page.locator("#style").get_by_text(sign).first.wait_for()
        assert user(page).input_value().startswith("you")
    tab(page, "History")
    assert page.locator("#items td").all_inner_texts() == ["–", "Moin Ida 🌊", "–", "Moin 🌊"]
    shot(page, "mine")
    forget(page)


def test_without_request(page):
    page.get_by_role("textbox", name="Request").fill("  ")
    page.get_by_role("button", name="Ask").click()
    page.locator("#asked [role=alert]").get_by_text("the request is empty").wait_for()
    shot(page, "errors")


def test_report_with_its_plots(page):
    tab(page, "Report")
    report = page.locator("#report")
    assert "Knows the user: yes" in report.inner_text()
    images = report.locator("img")
    assert images.count() == 2
    assert all(image.evaluate("i => i.naturalWidth") > 100 for image in images.all())
    shot(page, "report")


def test_edit_and_delete_an_item(page):
    choose(page, "kit")
    add(page, "one -> first\ntwo -> second")
    page.get_by_role("button", name="Edit or delete one item").click()
    page.get_by_role("combobox", name="Item").click()
    page.get_by_role("option", name="one -> first").click()
    page.locator("#item-output textarea").wait_for()
    page.wait_for_function("document.querySelector('#item-output textarea').value === 'first'")
    page.locator("#item-output textarea").fill("better")
    page.get_by_role("button", name="Save").click()
    page.locator("#edited").get_by_text("Saved.").wait_for()
    assert page.locator("#items td").all_inner_texts() == ["one", "better", "two", "second"]
    page.get_by_role("button", name="Delete this item").click()
    page.locator("#edited [role=alert]").get_by_text("choose one from the list").wait_for()
    page.get_by_role("combobox", name="Item").click()
    page.get_by_role("option", name="two -> second").click()
    page.wait_for_function("document.querySelector('#item-output textarea').value === 'second'")
    page.get_by_role("button", name="Delete this item").click()
    page.locator("#edited").get_by_text("Deleted.").wait_for()
    assert page.locator("#items td").all_inner_texts() == ["one", "better"]


def forget(page):
    page.get_by_role("button", name="Forget this user").click()
    page.get_by_role("button", name="Yes, forget everything").click()
    page.locator("#forgotten").get_by_text("is forgotten").wait_for()


def test_forget_asks_once_and_shows_that_nothing_is_left(page, served, browser):
    choose(page, "fay")
    add(page, "a secret of fay -> hidden words")
    ask(page, "a secret")
    tab(page, "History")
    page.get_by_role("button", name="Forget this user").click()
    page.locator("#confirm").get_by_text("Delete all of fay, 1 item with texts and vectors, for good?").wait_for()
    shot(page, "forget-question")
    page.get_by_role("button", name="Keep").click()
    page.locator("#confirm").wait_for(state="hidden")
    assert page.locator("#items tbody tr").count() == 1
    forget(page)
    assert re.search(r"fay is forgotten: 1 item and \d+ cached vectors deleted, 0 items left\.", page.content())
    page.locator("#chosen").get_by_text("No user is chosen").wait_for()
    assert "hidden words" not in page.content()
    shot(page, "forgotten")
    for other in open_page(browser, served[0]):
        user(other).click()
        other.get_by_role("option", name="ann").wait_for()
        assert other.get_by_role("option", name="fay").count() == 0


def focused(page):
    return page.evaluate("""() => { const e = document.activeElement;
        return e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || e.tagName; }""").strip()


def press_until(page, wanted, key="Tab", most=30):
    """Press a key until an element is focused whose name begins so; gives the names on the way."""
    names = []
    for _ in range(most):
        page.keyboard.press(key)
        names.append(focused(page))
        if names[-1].startswith(wanted):
            return names
    raise AssertionError(f"{wanted} is not reached: {names}")


def test_keyboard_alone(page):
    press_until(page, "User")
    page.keyboard.type("kim")
    page.keyboard.press("Enter")
    page.locator("#chosen").get_by_text("kim is new").wait_for()
    press_until(page, "Ask")
    press_until(page, "History")
    page.keyboard.press("Enter")
    press_until(page, "Paste items")
    page.keyboard.type("the sea -> blue")
    names = press_until(page, "Add")
    assert len(names) <= 3  # the file's button lies between
    page.keyboard.press("Enter")
    page.locator("#added").get_by_text("1 new item.").wait_for()
    press_until(page, "Ask", "Shift+Tab")
    page.keyboard.press("Enter")
    press_until(page, "Request")
    page.keyboard.type("the sky")
    page.keyboard.press("Enter")
    page.locator("#weights tbody tr").wait_for()
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    press_until(page, "Ask")
    press_until(page, "History", "Shift+Tab")
    page.keyboard.press("Enter")
    press_until(page, "Forget this user", most=40)
    page.keyboard.press("Enter")
    page.locator("#confirm").get_by_text("Delete all of kim, 1 item").wait_for()
    press_until(page, "Yes, forget")
    page.keyboard.press("Enter")
    page.locator("#forgotten").get_by_text("kim is forgotten").wait_for()


def test_phone_width_needs_no_sideways_scrolling(served, browser):
    for page in open_page(browser, served[0], width=390):
        choose(page, "ann")
        ask(page, "rate this, with a wordthatislongerthananyphonescreeniswideandhasnoplacewhereitcouldbreak" + "x" * 80)
        places = [page.get_by_role("region", name=n).bounding_box()["y"] for n in ("This user: ann", "Few-shot")]
        assert places[0] < places[1]
        for name in TABS:
            tab(page, name)
            page.wait_for_timeout(300)
            wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide[0] <= wide[1], name
            shot(page, f"phone-{name.lower()}")
        tab(page, "Ask")
        small = [
            b
            for b in (e.bounding_box() for e in page.get_by_role("button").all() if e.is_visible())
            if b["height"] < 24
        ]
        assert not small


def test_nothing_is_asked_of_the_outside(served, page):
    address, outside = served
    choose(page, "ann")
    ask(page, "rate this")
    for name in TABS:
        tab(page, name)
    page.wait_for_timeout(500)
    assert page.asked
    assert not [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]
    assert outside.read_text() == ""
    policy = page.request.get(address).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert page.request.get(address, headers={"Host": "elsewhere.example"}).status == 400


def test_browser_keeps_nothing(page):
    choose(page, "ann")
    ask(page, "rate this secretly")
    page.wait_for_timeout(1000)
    kept = page.evaluate("""async () => { const all = [JSON.stringify({...localStorage, ...sessionStorage})];
        for (const {name} of await indexedDB.databases()) all.push(await new Promise(done => {
            const opened = indexedDB.open(name);
            opened.onsuccess = () => { const names = [...opened.result.objectStoreNames], found = [];
                if (!names.length) return done('');
                const reading = opened.result.transaction(names);
                names.forEach(n => { reading.objectStore(n).getAll().onsuccess = e => found.push(e.target.result); });
                reading.oncomplete = () => { opened.result.close(); done(JSON.stringify(found)); }; };
        })); return all.join(); }""")
    assert "secretly" not in kept
    assert "secretly" not in str(page.context.cookies())


def test_empty_store_and_labels(make_plug, browser, tmp_path):
    make_plug(differ=True, answers=("4", "5")).save_pretrained(tmp_path / "plug")
    with demo(tmp_path / "plug", tmp_path / "run") as (address, process, _):
        scratch = [p for p in (tmp_path / "run").iterdir() if p.name.startswith("persona-plug-demo-")]
        assert len(scratch) == 1
        for page in open_page(browser, address, begins="No user is chosen"):
            assert "temporary file" in page.content()
            page.get_by_role("textbox", name="Request").fill("hello")
            page.get_by_role("button", name="Ask").click()
            page.locator("#chosen [role=alert]").get_by_text("no user is chosen").wait_for()  # beside the field
            tab(page, "Report")
            assert "holds no report" in page.locator("#report").inner_text()
            choose(page, "ann")
            add(page, "rate the film -> 5")
            ask(page, "rate this")
            assert "No other user is in the store yet" in page.get_by_role("region", name="Another user").inner_text()
            rows = page.get_by_role("region", name="This user: ann").locator("tbody tr").all_inner_texts()
            assert {row.split()[0] for row in rows} == {"4", "5"}
            assert sum(float(row.split()[1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.2)
            shot(page, "labels")
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert not scratch[0].exists()  # histories and uploads went with the page
