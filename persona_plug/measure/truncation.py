"""What is cut or left out, counted: nothing is shortened in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persona_plug.data.splits import FitData
    from persona_plug.model import PlugModel


def truncation_notes(plug: PlugModel, data: FitData) -> list[str]:
    """Return a line for each kind of text that is cut: requests, answers, what the encoder reads, long histories."""
    config, prompter, questions = plug.config, plug.prompter, data.held_out
    notes = []

    def note(count: int, total: int, what: str, limit: str) -> None:
        if count:
            notes.append(f"{count} of {total} {what} were cut to {limit}")

    for whose, part in (("training", [*data.train, *data.valid]), ("held-out", questions)):
        cut = sum(prompter.parts(e.input, e.prompt).cut > 0 for e in part)
        note(cut, len(part), f"{whose} requests", f"{config.max_input_tokens} tokens")
        if config.answers is None:  # a token is kept for the end
            cut = sum(len(prompter.ids(e.output)) >= config.max_answer_tokens for e in part)
            note(cut, len(part), f"{whose} answers", f"{config.max_answer_tokens} tokens")
    shown = {turn for turns in plug.turns(questions) for turn in turns}
    limits = (config.max_input_tokens, config.max_answer_tokens - 1)
    cut = sum(len(prompter.ids(text)) > limit for turn in shown for text, limit in zip(turn, limits, strict=True))
    note(cut, 2 * len(shown), "texts of items in the prompt", f"{limits[0]} (inputs) or {limits[1]} (outputs) tokens")
    texts = {e.input for e in questions}
    texts |= {text for e in questions for item in e.history for text in (item.input, item.output)}
    cut = plug.encoder.count_cut(sorted(texts))
    note(cut, len(texts), "held-out texts", f"the encoder's {plug.encoder.max_length} tokens")
    dropped = sum(max(0, len(e.history) - config.max_history) for e in questions)
    if dropped:
        notes.append(f"{dropped} history items beyond max_history={config.max_history} were left out")
    return notes
