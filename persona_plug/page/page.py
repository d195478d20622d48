"""The page's widgets: gradio blocks around a `Session`, served on one address without anything from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, PersonaPlugError
from persona_plug.page import view
from persona_plug.page.answers import COLUMNS, Answer, Column
from persona_plug.page.session import SELF, Session, named

CHOICES = 1000  # users in the list; the others are found by typing their id
# The browser itself refuses whatever is not from this address; gradio's own code needs the two `unsafe`.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
)
# Over gradio's plainest theme: small text with a contrast of 4.5 and more, and a red button for what cannot be undone.
THEME = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_title_text_color": "*neutral_700",
    "block_label_text_color": "*neutral_700",
    "button_primary_background_fill": "*primary_600",
    "button_cancel_background_fill": "#b91c1c",
    "button_cancel_background_fill_dark": "#b91c1c",
    "button_cancel_background_fill_hover": "#991b1b",
    "button_cancel_background_fill_hover_dark": "#991b1b",
    "button_cancel_text_color": "white",
    "button_cancel_text_color_dark": "white",
    "button_cancel_text_color_hover": "white",
    "layout_gap": "*spacing_lg",
}
NOBODY = "No user is chosen: choose one above, or type a new id."
MINE = (
    "Paste three of your own messages, with an empty line between two, and press Enter. They are kept as the items of "
    f"the user {SELF!r}, in place of earlier ones. Read your greeting, sign-off and emoji in the first card."
)
PASTE = 'One item a line: "request -> what this user wrote", or only what they wrote, or JSON with input and output.'


class Page:
    """The widgets and what happens when they are used; a handler returns the new values of its outputs."""

    def __init__(self, session: Session, kept: str, scratch: Path) -> None:
        """Build the blocks.

        Args:
            session: What the page shows.
            kept: Where histories are kept, in words.
            scratch: Folder for uploads, which its owner removes.

        Raises:
            ConfigError: gradio is missing.
        """
        # Both are read when gradio is imported.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(scratch)
        try:
            import gradio
        except ImportError as exc:
            raise ConfigError("the page needs gradio: pip install 'persona-plug[app]'") from exc
        self.gr: Any = gradio
        self.session = session
        self.blocks: Any = gradio.Blocks(title="persona_plug", analytics_enabled=False)
        with self.blocks:
            config = session.plug.config
            gradio.HTML(view.header(config.llm, config.encoder, kept))
            self.user = gradio.Dropdown(
                label="User",
                info="Choose one, or type a new id and press Enter.",
                choices=[],
                value=None,
                allow_custom_value=True,
                elem_id="user",
            )
            self.chosen = gradio.HTML(view.note(NOBODY), elem_id="chosen")
            self.whose = gradio.State("")  # whose answers the cards show
            with gradio.Tab("Ask"):
                self._build_ask()
            with gradio.Tab("History"):
                self._build_history()
            with gradio.Tab("Report"):
                gradio.HTML(self._report(), elem_id="report")
            on = {"show_progress": "minimal", "api_visibility": "private"}
            self.blocks.load(self.begin, None, [self.user, self.request], **on)
            changed = self.user.change(
                self.choose, [self.user, self.whose, self.request], [*self._held(), *self._cards(), self.examples], **on
            )
            changed.then(self.hide, None, self.confirm, **on)
            self.examples.input(lambda text: text, self.examples, self.request, **on)
            on = {
                "show_progress": "hidden",
                "trigger_mode": "once",
                "api_visibility": "private",
            }  # the cards say it all
            answers = [self.chosen, self.asked, *self._cards(), self.whose]
            asking = [self.button.click, self.request.submit]
            gradio.on(asking, self.ask, [self.user, self.request], answers, **on)
            self.mine.submit(self.try_mine, [self.mine, self.request], [self.user, *self._held()[1:], *answers], **on)

    # -- tabs ------------------------------------------------------------------------------------------------------

    def _build_ask(self) -> None:
        gr = self.gr
        gr.HTML(view.note(view.COMPARED))
        self.examples = gr.Radio(label="Example requests", choices=[], value=None, elem_id="examples")
        self.request = gr.Textbox(
            label="Request", info="Enter asks, Shift+Enter begins a new line.", max_lines=6, value="", elem_id="request"
        )
        self.button = gr.Button("Ask", variant="primary", elem_id="ask")
        self.asked = gr.HTML(elem_id="asked")
        self.cards = gr.HTML(view.cards({}), elem_id="cards")
        self.bars = gr.HTML(elem_id="weights")
        self.style = gr.HTML(elem_id="style")
        self.mine = gr.Textbox(label="Try it as yourself", info=MINE, lines=1, max_lines=12, value="", elem_id="mine")

    def _build_history(self) -> None:
        gr = self.gr
        self.items = gr.HTML(view.note("Choose a user to see what is held about them."), elem_id="items")
        self.pasted = gr.Textbox(label="Paste items", info=PASTE, lines=4, max_lines=12, value="", elem_id="pasted")
        self.file = gr.File(
            label="Or a file of events (JSONL or Parquet)",
            file_types=[".jsonl", ".ndjson", ".json", ".parquet"],
            height=140,
            elem_id="file",
        )
        add = gr.Button("Add", variant="primary", elem_id="add")
        self.added = gr.HTML(elem_id="added")
        with gr.Accordion("Edit or delete one item", open=False):
            self.picked = gr.Dropdown(label="Item", choices=[], value=None, elem_id="picked")
            self.input = gr.Textbox(label="Input", max_lines=6, value="", elem_id="item-input")
            self.output = gr.Textbox(label="Output", max_lines=6, value="", elem_id="item-output")
            with gr.Row():
                save = gr.Button("Save", elem_id="save")
                delete = gr.Button("Delete this item", variant="stop", elem_id="delete")
            self.edited = gr.HTML(elem_id="edited")
        forget = gr.Button("Forget this user …", elem_id="forget")
        with gr.Column(visible=False, elem_id="confirm") as self.confirm:
            self.warning = gr.HTML()
            with gr.Row():
                yes = gr.Button("Yes, forget everything", variant="stop", elem_id="forget-yes")
                no = gr.Button("Keep", elem_id="forget-no")
        self.forgotten = gr.HTML(elem_id="forgotten")
        on = {"show_progress": "minimal", "api_visibility": "private"}
        fields = [self.input, self.output]
        add.click(
            self.add, [self.user, self.pasted, self.file],
            [self.added, self.pasted, self.file, self.user, *self._held()], **on,
        )  # fmt: skip
        self.picked.change(self.pick, [self.user, self.picked], fields, **on)
        save.click(self.save, [self.user, self.picked, *fields], [self.edited, *self._held()], **on)
        delete.click(self.delete, [self.user, self.picked], [self.edited, *self._held()], **on)
        doomed = gr.State("")  # who the question names is who goes
        forget.click(self.ask_forget, self.user, [self.confirm, self.warning, self.forgotten, doomed], **on)
        no.click(self.hide, None, self.confirm, **on)
        yes.click(self.forget, doomed, [self.confirm, self.forgotten, self.user], **on)

    def _held(self) -> list[Any]:
        """Return the outputs that show a user's items; `held` gives their values."""
        return [self.chosen, self.style, self.items, self.picked]

    def _cards(self) -> list[Any]:
        """Return the outputs that show answers."""
        return [self.cards, self.bars]

    def _report(self) -> str:
        try:
            made = self.session.report()
        except PersonaPlugError as exc:
            return view.bad(exc)
        return view.report(*made) if made else view.note("The plug's folder holds no report: `fit` writes one.")

    # -- handlers --------------------------------------------------------------------------------------------------

    def list_users(self, **changes: Any) -> Any:  # noqa: ANN401
        """Fill the list of users, those with the most items first if there are too many."""
        rows = sorted(self.session.users(), key=lambda row: -row.items)
        shown = sorted(rows[:CHOICES], key=lambda row: row.user_id)
        left = f" {len(rows) - CHOICES} more are found by their id." if len(rows) > CHOICES else ""
        info = f"Choose one, or type a new id and press Enter.{left}"
        return self.gr.Dropdown(choices=[(f"{r.user_id} ({r.items})", r.user_id) for r in shown], info=info, **changes)

    def held(self, user: str) -> list[Any]:
        """Return a line on a user, their style, the table of their items, and the items to pick from."""
        items = self.session.items(user)
        says = (
            f"{user}: {view.counted(len(items))}." if items else f"{user} is new: no items yet. Add some under History."
        )
        choices = [(_label(i, number), i.id) for number, i in enumerate(items[: view.SHOWN_ITEMS], 1)]
        style = view.style(user, self.session.style(user))
        return [view.note(says), style, view.items(user, items), self.gr.Dropdown(choices=choices, value=None)]

    def begin(self) -> list[Any]:
        """Choose a user and a request to begin with; the change of user shows the rest."""
        user = self.session.first()
        return [self.list_users(value=user), next(iter(self.session.examples(user)), "")]

    def choose(self, user: str | None, whose: str, request: str) -> list[Any]:
        """Show a user, clear what was answered for another, and offer requests that others were asked."""
        name = (user or "").strip()
        skip = self.gr.skip()
        cards = [skip, skip] if name and name == whose else [view.cards({}), ""]
        shown = [
            view.note(NOBODY),
            "",
            view.note("Choose a user to see the items."),
            self.gr.Dropdown(choices=[], value=None),
        ]
        try:
            shown = self.held(named(user)) if name else shown
            examples = self.session.examples(name or None)
        except PersonaPlugError as exc:
            return [view.bad(exc), *shown[1:], *cards, skip]
        chosen = request if request in examples else None
        return [*shown, *cards, self.gr.Radio(choices=examples, value=chosen)]

    def ask(self, user: str | None, request: str) -> Iterator[list[Any]]:
        """Answer in four ways, each shown as it comes; whoever is missing is said beside the field to fill."""
        skip = self.gr.skip()
        try:
            name = named(user)
        except PersonaPlugError as exc:
            yield [view.bad(exc), *[skip] * 4]
            return
        answers: dict[Column, Answer] = {}
        try:
            if request.strip():
                yield [skip, "", view.cards(answers, running=True), "", name]
            for column in COLUMNS:
                answers[column] = self.session.comparison.answer(column, name, request)
                bars = view.weights(answers["own"]) if column == COLUMNS[-1] else skip
                yield [skip, skip, view.cards(answers, running=column != COLUMNS[-1]), bars, skip]
        except PersonaPlugError as exc:
            yield [skip, view.bad(exc), view.cards(answers), *[skip] * 2]

    def try_mine(self, pasted: str, request: str) -> Iterator[list[Any]]:
        """Make pasted messages the history of a user of their own, and answer as them."""
        skip = self.gr.skip()
        try:
            self.session.take(pasted)
        except PersonaPlugError as exc:
            yield [*[skip] * 5, view.bad(exc), *[skip] * 3]
            return
        says, *held = self.held(SELF)
        yield [self.list_users(value=SELF), *held, says, *[skip] * 3, SELF]
        for answers in self.ask(SELF, request.strip() or next(iter(self.session.examples(SELF)), "")):
            yield [*[skip] * 4, *answers]

    def add(self, user: str | None, pasted: str, file: str | None) -> list[Any]:
        """Store pasted lines and a file; what is bad stays where it was typed."""
        skip = self.gr.skip()
        try:
            new = self.session.add(user or "", pasted, Path(file) if file else None)
        except PersonaPlugError as exc:
            return [view.bad(exc), *[skip] * 7]
        if file:  # gradio keeps a copy of what was uploaded; a user who is forgotten must not live on in it
            Path(file).unlink(missing_ok=True)
        name = named(user)
        others = f" of {len(new)} users, of these {new.get(name, 0)} of {name}" if set(new) != {name} else ""
        says = f"{view.counted(sum(new.values()), 'new item')}{others}."
        return [view.good(says), "", None, self.list_users(), *self.held(name)]

    def pick(self, user: str, picked: str | None) -> list[str]:
        """Put the picked item into the two fields."""
        item = self.session.item(user, picked) if picked else HistoryItem("", "")
        return [item.input, item.output]

    def save(self, user: str, picked: str | None, input: str, output: str) -> list[Any]:
        """Store the edited item."""
        try:
            self.session.edit(named(user), picked, input, output)
        except PersonaPlugError as exc:
            return [view.bad(exc), *[self.gr.skip()] * 4]
        return [view.good("Saved."), *self.held(named(user))]

    def delete(self, user: str, picked: str | None) -> list[Any]:
        """Delete the picked item."""
        try:
            self.session.delete(named(user), picked)
        except PersonaPlugError as exc:
            return [view.bad(exc), *[self.gr.skip()] * 4]
        return [view.good("Deleted."), *self.held(named(user))]

    def ask_forget(self, user: str | None) -> list[Any]:
        """Ask once before everything about a user is deleted."""
        try:
            count = len(self.session.items(named(user)))
        except PersonaPlugError as exc:
            return [self.gr.Column(visible=False), "", view.bad(exc), ""]
        says = f"Delete all of {user}, {view.counted(count)} with texts and vectors, for good?"
        return [self.gr.Column(visible=True), view.bad(says), "", named(user)]

    def hide(self) -> Any:  # noqa: ANN401
        """Take the question back."""
        return self.gr.Column(visible=False)

    def forget(self, user: str) -> list[Any]:
        """Delete everything about a user and show that nothing is left; the change of user clears the rest."""
        gone, left = self.session.forget(user)
        what = f"{view.counted(gone.items)} and {view.counted(gone.cached_vectors, 'cached vector')}"
        says = f"{user} is forgotten: {what} deleted, {view.counted(left)} left."
        return [self.gr.Column(visible=False), view.good(says), self.list_users(value=None)]

    def serve(self, host: str, port: int) -> str:
        """Start serving in the background and return the address; `blocks.close()` ends it.

        Raises:
            ConfigError: The port is taken.
        """
        from fastapi.middleware import Middleware
        from fastapi.middleware.trustedhost import TrustedHostMiddleware

        hosts = ["localhost", "127.0.0.1", "::1"] if host in ("localhost", "127.0.0.1", "::1") else ["*"]
        guards = [Middleware(_Guard, policy=POLICY), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
        themes = self.gr.themes
        theme = themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        theme.set(**THEME)
        try:
            _, address, _ = self.blocks.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                run_history=False,  # the browser would keep every request and answer
                ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[],
                theme=theme, css=view.CSS, app_kwargs={"middleware": guards},
            )  # fmt: skip
        except OSError as exc:
            raise ConfigError(f"port {port} of {host} cannot be used; choose another with --port") from exc
        return str(address)


class _Guard:
    """Sends the content policy with every answer."""

    def __init__(self, app: Any, policy: str) -> None:  # noqa: ANN401
        self.app, self.policy = app, policy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ANN401
        async def sending(message: Any) -> None:  # noqa: ANN401
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", self.policy.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, receive, sending)


def _label(item: HistoryItem, number: int) -> str:
    text = " ".join((item.output if not item.input else f"{item.input} -> {item.output}").split())
    return f"{number}. {text:.80}"
