"""From a request to token ids around the place where the soft tokens go."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persona_plug.config import PlugConfig
from persona_plug.errors import ConfigError, DataError

_MARK = "\u241fplug\u241f"


@dataclass(frozen=True, slots=True)
class PromptParts:
    """Token ids in front of (`left`) and behind (`right`) the soft tokens; `cut` input tokens did not fit."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    cut: int = 0


class Prompter:
    """Renders requests with the config's template and the LLM's chat template.

    With a chat template the soft tokens sit inside the user turn: behind its text (suffix, so right before the
    assistant turn) or in front of it (prefix). Without one a line break separates input and answer. For an
    encoder-decoder, `left` is empty with prefix and `right` is empty with suffix placement.
    """

    def __init__(self, tokenizer: Any, config: PlugConfig, encoder_decoder: bool) -> None:  # noqa: ANN401
        """Prepare the fixed parts for a tokenizer."""
        self.tokenizer, self.config, self.encoder_decoder = tokenizer, config, encoder_decoder
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            raise ConfigError("the LLM's tokenizer has no end-of-sequence token; set tokenizer.eos_token first")
        before, after = "", "" if encoder_decoder else "\n"
        if getattr(tokenizer, "chat_template", None) and not encoder_decoder:
            turn = [{"role": "user", "content": _MARK}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            if text.count(_MARK) != 1:
                raise ConfigError(
                    "the chat template does not render the user's text exactly once; pass another tokenizer"
                )
            before, after = text.split(_MARK)
            self.before = self.ids(before, plain=False)
        else:
            probe = tokenizer("a")["input_ids"]
            self.before = (
                [probe[0]] if tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id else []
            )
        self.after = [self.eos] if encoder_decoder else self.ids(after, plain=False)
        # What all prompts begin with; the last token may merge with the request's first and is left out.
        self.head = tuple([*self.before, *self.ids(config.template.split("{input}")[0])][:-1])

    def ids(self, text: str, plain: bool = True) -> list[int]:
        """Tokenise without adding special tokens; in plain text those that people write out are mere characters.

        Else a request that holds the end-of-turn mark would end the user's turn.
        """
        options = {"add_special_tokens": False, "split_special_tokens": plain, "verbose": False}
        return list(self.tokenizer(text, **options)["input_ids"])

    def ids_of_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise plain texts as `ids` does, all at once, which takes a third of the time."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [list(row) for row in self.tokenizer(list(texts), **options)["input_ids"]] if texts else []

    def parts(self, request: str, prompt: str | None = None) -> PromptParts:
        """Render one request; a `prompt` is taken as it is in place of the filled template."""
        body, cut = self._body(request, self.config.template) if prompt is None else self._body(prompt, "{input}")
        if self.config.placement == "suffix":
            if self.encoder_decoder:
                return PromptParts((*self.before, *body, *self.after), (), cut)
            return PromptParts((*self.before, *body), tuple(self.after), cut)
        if self.encoder_decoder:
            return PromptParts((), (*self.before, *body, *self.after), cut)
        return PromptParts(tuple(self.before), (*body, *self.after), cut)

    def chat(self, messages: Sequence[tuple[str, str]]) -> tuple[PromptParts, str]:
        """Render a conversation, and return with it the request that steers the plug: the last message of the user.

        The config's template is put around that message alone, and the soft tokens sit in its turn. All others are
        taken as they are, none is cut. A single message of the user gives what `parts` gives.

        Args:
            messages: (role, text) pairs; roles are `system`, `user`, `assistant`.

        Raises:
            DataError: There is no message of the user, or the LLM's chat template refuses the conversation.
        """
        asked = max((i for i, (role, _) in enumerate(messages) if role == "user"), default=None)
        if asked is None:
            raise DataError("messages hold none of role 'user': add the request as one")
        request = messages[asked][1]
        if len(messages) == 1:
            return self.parts(request), request
        if self.encoder_decoder or not getattr(self.tokenizer, "chat_template", None):
            raise DataError("this LLM has no chat template: send a single message of role 'user'")
        frame = self._frame([role for role, _ in messages])
        body, cut = self._body(request, self.config.template)
        texts = [body if i == asked else self.ids(text) for i, (_, text) in enumerate(messages)]
        pieces = [frame[0], *(ids for text, piece in zip(texts, frame[1:], strict=True) for ids in (text, piece))]
        at = 2 * asked + (2 if self.config.placement == "suffix" else 1)
        left, right = (tuple(itertools.chain(*part)) for part in (pieces[:at], pieces[at:]))
        return PromptParts(left, right, cut), request

    def _frame(self, roles: Sequence[str]) -> list[list[int]]:
        """Return the ids that the chat template puts in front of, between and behind messages of these roles."""
        turns = [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as exc:  # a template is its author's program: whatever it raises says that it will not do
            raise DataError(f"the LLM's chat template refuses these roles ({exc}); change their order") from exc
        found = re.split(f"{_MARK}([0-9]+){_MARK}", text)
        if [int(i) for i in found[1::2]] != list(range(len(roles))):
            raise DataError("the LLM's chat template leaves out messages of these roles; send fewer")
        return [self.ids(piece, plain=False) for piece in found[::2]]

    def answer(self, text: str) -> tuple[int, ...]:
        """Tokenise an answer, cut to leave room for the end token."""
        return tuple(self.ids(text)[: self.config.max_answer_tokens - 1])

    def _body(self, request: str, template: str) -> tuple[list[int], int]:
        """Fill the template; only the request is cut, from its end, so that the instruction stays whole."""
        limit = self.config.max_input_tokens
        body = self.ids(template.replace("{input}", request))
        over = len(body) - limit
        if over <= 0:
            return body, 0
        encoded = self.tokenizer(
            request, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        offsets = encoded["offset_mapping"]
        keep = max(0, len(offsets) - over)
        while True:
            kept = request[: offsets[keep - 1][1]] if keep else ""
            body = self.ids(template.replace("{input}", kept))
            if len(body) <= limit:
                return body, len(offsets) - len(self.ids(kept))  # a character may be several tokens
            if keep == 0:
                break
            keep = max(0, keep - (len(body) - limit))
        raise ConfigError(
            f"the template alone has more than max_input_tokens={limit} tokens; shorten it or raise the limit"
        )


@dataclass(frozen=True, slots=True)
class AnswerTree:
    """Candidate answers of one request as a tree of tokens, so that shared beginnings run through the LLM once.

    Attributes:
        tokens: Token of each node, parents before children.
        parents: Index of each node's parent, -1 for the end of the prompt.
        paths: For each candidate, (node that predicts, predicted token) pairs; node -1 is the end of the prompt.
        gold_end: The pair that scores the end token of the gold answer where paths leave end tokens out.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]
    gold_end: tuple[int, int] | None = None

    @classmethod
    def build(cls, candidates: list[tuple[int, ...]], eos: int, gold: int | None = None) -> AnswerTree:
        """Build the tree.

        The end token belongs to a candidate's score if there is one candidate only, or if one begins another: else "1"
        would win against "10" by being shorter. Candidates none of which begins another are disjoint events without it.
        """
        closed = len(candidates) == 1 or not _prefix_free(candidates)
        tokens: list[int] = []
        parents: list[int] = []
        index: dict[tuple[int, int], int] = {}

        def node(parent: int, token: int) -> int:
            if (parent, token) not in index:
                index[parent, token] = len(tokens)
                tokens.append(token)
                parents.append(parent)
            return index[parent, token]

        paths = []
        gold_end = None
        for i, candidate in enumerate(candidates):
            path, at = [], -1
            for position, token in enumerate(candidate):
                path.append((at, token))
                if closed or i == gold or position + 1 < len(candidate):
                    at = node(at, token)
            if closed:
                path.append((at, eos))
            elif i == gold:
                gold_end = (at, eos)
            paths.append(tuple(path))
        return cls(tuple(tokens), tuple(parents), tuple(paths), gold_end)


def _prefix_free(candidates: list[tuple[int, ...]]) -> bool:
    ordered = sorted(candidates)
    return all(candidates) and not any(b[: len(a)] == a for a, b in itertools.pairwise(ordered))
