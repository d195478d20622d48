"""From a request to token ids around the place where the soft tokens go."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from persona_plug.config import PlugConfig
from persona_plug.errors import ConfigError, DataError
from persona_plug.models.llm import Limits

# How a template asks for the day; the arguments that transformers hands to one are data, not functions.
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_MARK = "\u241fplug\u241f"

Turns = tuple[str, str]  # an earlier request, and the answer to it


@dataclass(frozen=True, slots=True)
class PromptParts:
    """Token ids in front of (`left`) and behind (`right`) the soft tokens; `cut` input tokens did not fit."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    cut: int = 0

    def __len__(self) -> int:
        """Return the number of tokens around the soft ones."""
        return len(self.left) + len(self.right)


class Prompter:
    """Renders requests with the config's template and the LLM's chat template.

    With a chat template the soft tokens sit inside the user turn: behind its text (suffix, so right before the
    assistant turn) or in front of it (prefix). Without one a line break separates input and answer. For an
    encoder-decoder, `left` is empty with prefix and `right` is empty with suffix placement.
    """

    def __init__(
        self,
        tokenizer: Any,  # noqa: ANN401
        config: PlugConfig,
        encoder_decoder: bool,
        limits: Limits | None = None,
    ) -> None:
        """Prepare the fixed parts for a tokenizer.

        Args:
            tokenizer: The LLM's tokenizer.
            config: Template, placement, lengths and the chat template's arguments.
            encoder_decoder: Whether the LLM is one.
            limits: What the LLM can read; without it nothing is checked.

        Raises:
            ConfigError: The tokenizer has no end token, does not fit the LLM, or its chat template does not serve.
        """
        self.tokenizer, self.config, self.encoder_decoder, self.limits = tokenizer, config, encoder_decoder, limits
        eos = tokenizer.eos_token_id
        if eos is None:
            raise ConfigError("the LLM's tokenizer has no end-of-sequence token; set tokenizer.eos_token first")
        if limits:
            _check_vocabulary(tokenizer, limits.rows)
        if config.retrieve and not self.chats:
            raise ConfigError(
                f"retrieve={config.retrieve} puts items into the prompt as chat turns, and this LLM has no chat "
                "template: use retrieve=0"
            )
        before, after, end = "", "" if encoder_decoder else "\n", eos
        if self.chats:
            text = self._render([{"role": "user", "content": _MARK}])
            if text.count(_MARK) != 1:
                raise ConfigError(
                    "the chat template does not render the user's text exactly once; pass another tokenizer"
                )
            before, after = text.split(_MARK)
            self.before = self.ids(before, plain=False)
            end = self._turn_end(eos)
        else:
            probe = tokenizer("a")["input_ids"]
            self.before = (
                [probe[0]] if tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id] else []
            )
        self.eos = end
        """The token that ends an answer: what ends the assistant's turn in the chat template, else the tokenizer's."""
        self.after = [eos] if encoder_decoder else self.ids(after, plain=False)
        # What all prompts begin with; the last token may merge with the request's first and is left out.
        self.head = tuple([*self.before, *self.ids(config.template.split("{input}")[0])][:-1])

    @property
    def chats(self) -> bool:
        """Whether the LLM reads conversations."""
        return not self.encoder_decoder and bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def digest(self) -> str:
        """Identity of what stands around every request, the end token included (16 hex digits)."""
        return hashlib.sha256(repr((self.before, self.after, self.eos)).encode()).hexdigest()[:16]

    def _render(self, turns: Sequence[dict[str, str]], reply: bool = True) -> str:
        """Render a conversation with the chat template; `reply` adds the header of the assistant's turn.

        Raises:
            ConfigError: The template refuses it.
        """
        options = {"tokenize": False, "add_generation_prompt": reply, **self.config.chat_template_args}
        try:
            if self.config.template_day:
                day = date.fromisoformat(self.config.template_day)
                template = self.tokenizer.get_chat_template()
                options["chat_template"] = _TODAY.sub(lambda call: repr(day.strftime(call[2])), template)
            return str(self.tokenizer.apply_chat_template(list(turns), **options))
        except Exception as exc:  # a template is its author's program: whatever it raises says that it will not do
            line = next(iter(str(exc).splitlines()), type(exc).__name__)[:160]
            raise ConfigError(f"the LLM's chat template fails ({line}); set chat_template_args or mend it") from exc

    def _turn_end(self, eos: int) -> int:
        """Return the token that ends the assistant's turn: the first special one behind its text, else `eos`."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        try:
            behind = self._render(turns, reply=False).rpartition(_MARK)[2]
        except ConfigError:  # a template that only asks
            return eos
        special = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
        return next((token for token in self.ids(behind, plain=False) if token in special), eos)

    def ids(self, text: str, plain: bool = True) -> list[int]:
        """Tokenise without adding special tokens; in plain text those that people write out are mere characters.

        Else a request that holds the end-of-turn mark would end the user's turn.
        """
        options = {"add_special_tokens": False, "split_special_tokens": plain, "verbose": False}
        return list(self.tokenizer(text, **options)["input_ids"])

    def candidates(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokenise candidate answers.

        Raises:
            ConfigError: The tokenizer cannot write one of them, or writes two of them alike.
        """
        if other := [text for text in texts if not isinstance(text, str)]:
            raise ConfigError(f"candidates must be texts, not {other[0]!r:.40}")
        rows = [tuple(self.ids(text)) for text in texts]
        unknown = self.tokenizer.unk_token_id
        known: dict[tuple[int, ...], str] = {}
        for text, row in zip(texts, rows, strict=True):
            if (text and not row) or (unknown is not None and unknown in row):
                raise ConfigError(f"the LLM's tokenizer cannot write the answer {text!r:.60}; use other labels")
            if known.setdefault(row, text) != text:
                raise ConfigError(f"the LLM's tokenizer writes the answers {known[row]!r:.60} and {text!r:.60} alike")
        return rows

    def parts(self, request: str, prompt: str | None = None, shown: Sequence[Turns] = ()) -> PromptParts:
        """Render one request; a `prompt` is taken as it is in place of the filled template, and of what is `shown`."""
        if shown and prompt is None:
            parts = self.chat([("user", request)], shown)[0]
            self._check_length(len(parts.left) + len(parts.right))
            return parts
        body, cut = self._body(request, self.config.template) if prompt is None else self._body(prompt, "{input}")
        before, after = tuple(self.before), tuple(self.after)
        self._check_length(len(before) + len(body) + len(after))
        if self.config.placement == "suffix":
            if self.encoder_decoder:
                return PromptParts((*before, *body, *after), (), cut)
            return PromptParts((*before, *body), after, cut)
        if self.encoder_decoder:
            return PromptParts((), (*before, *body, *after), cut)
        return PromptParts(before, (*body, *after), cut)

    def _check_length(self, tokens: int) -> None:
        """Refuse a prompt that the LLM has no positions for, before anything runs."""
        if tokens == 0:
            raise DataError("the LLM's tokenizer writes the prompt as no token at all; set a template with words")
        whole = tokens + (0 if self.encoder_decoder and self.config.placement == "suffix" else self.config.soft_tokens)
        if self.limits and self.limits.positions is not None and whole > self.limits.positions:
            raise DataError(
                f"a prompt takes {whole} positions with its soft tokens, the LLM has {self.limits.positions}; "
                f"lower max_input_tokens={self.config.max_input_tokens}"
                + (f", or retrieve={self.config.retrieve}" if self.config.retrieve else "")
            )

    def check_trees(self, parts: Sequence[PromptParts], soft: int, trees: Sequence[AnswerTree]) -> None:
        """Refuse answers that the LLM has no positions for behind their prompts, each with `soft` soft tokens.

        Raises:
            DataError: There is one.
        """
        for part, tree in zip(parts, trees, strict=True):
            self.check_answer(len(part) + soft, tree.depth)

    def check_answer(self, prompt: int, answer: int) -> None:
        """Refuse an answer of so many tokens that the LLM has no positions for behind a prompt.

        Raises:
            DataError: The LLM has too few.
        """
        whole = answer if self.encoder_decoder else prompt + answer
        if self.limits and self.limits.positions is not None and whole > self.limits.positions:
            raise DataError(
                f"a prompt of {prompt} positions with an answer of {answer} tokens goes beyond the LLM's "
                f"{self.limits.positions}; lower max_input_tokens, or the answer's length (max_answer_tokens, "
                "max_new_tokens)"
            )

    def asked(self, messages: Sequence[tuple[str, str]]) -> int:
        """Return which message is the request: the last one of the user.

        Raises:
            DataError: There is none of the user.
        """
        found = max((i for i, (role, _) in enumerate(messages) if role == "user"), default=None)
        if found is None:
            raise DataError("messages hold none of role 'user': add the request as one")
        return found

    def chat(self, messages: Sequence[tuple[str, str]], shown: Sequence[Turns] = ()) -> tuple[PromptParts, str]:
        """Render a conversation, and return with it the request that steers the plug: the last message of the user.

        The config's template is put around that message alone, and the soft tokens sit in its turn. All others are
        taken as they are, none is cut. A single message of the user gives what `parts` gives.

        Args:
            messages: (role, text) pairs; roles are `system`, `user`, `assistant`.
            shown: Earlier requests with their answers, which stand as turns in front of the conversation, behind what
                the system says. They are cut as requests and answers are.

        Raises:
            DataError: There is no message of the user, or the LLM's chat template refuses the conversation.
        """
        request = messages[self.asked(messages)][1]
        if len(messages) == 1 and not shown:
            return self.parts(request), request
        first = next((i for i, (role, _) in enumerate(messages) if role != "system"), 0)
        turns = [(role, text) for pair in shown for role, text in zip(("user", "assistant"), pair, strict=True)]
        messages = [*messages[:first], *turns, *messages[first:]]
        asked = self.asked(messages)
        if not self.chats:
            raise DataError("this LLM has no chat template: send a single message of role 'user'")
        frame = self._frame([role for role, _ in messages])
        body, cut = self._body(request, self.config.template)
        room = {"user": self.config.max_input_tokens, "assistant": self.config.max_answer_tokens - 1}
        texts = [
            body if i == asked else self.ids(text)[: room[role] if 0 <= i - first < len(turns) else None]
            for i, (role, text) in enumerate(messages)
        ]
        pieces = [frame[0], *(ids for text, piece in zip(texts, frame[1:], strict=True) for ids in (text, piece))]
        at = 2 * asked + (2 if self.config.placement == "suffix" else 1)
        left, right = (tuple(itertools.chain(*part)) for part in (pieces[:at], pieces[at:]))
        return PromptParts(left, right, cut), request

    def _frame(self, roles: Sequence[str]) -> list[list[int]]:
        """Return the ids that the chat template puts in front of, between and behind messages of these roles."""
        turns = [{"role": role, "content": f"{_MARK}{i}{_MARK}"} for i, role in enumerate(roles)]
        try:
            text = self._render(turns)
        except ConfigError as exc:
            raise DataError(
                f"the LLM's chat template refuses these roles ({exc.__cause__}); change their order"
            ) from exc
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
        ends = self._ends(request)
        keep = max(0, len(ends) - over)
        while True:
            kept = request[: ends[keep - 1]] if keep else ""
            body = self.ids(template.replace("{input}", kept))
            if len(body) <= limit:
                return body, len(ends) - len(self.ids(kept))  # a character may be several tokens
            if keep == 0:
                break
            keep = max(0, keep - (len(body) - limit))
        raise ConfigError(
            f"the template alone has more than max_input_tokens={limit} tokens; shorten it or raise the limit"
        )

    def _ends(self, request: str) -> list[int]:
        """Return where each token of a request ends in it, in characters."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(request, return_offsets_mapping=True, **options)["offset_mapping"]
            return [end for _, end in offsets]
        ends: list[int] = []  # tokenizers in Python tell no offsets: count how many tokens each beginning has
        for end in range(1, len(request) + 1):
            ends += [end] * (len(self.ids(request[:end])) - len(ends))
        return ends


def template_day(tokenizer: Any) -> str:  # noqa: ANN401
    """Return today (ISO) where the tokenizer's chat template writes the day, else an empty text."""
    template = getattr(tokenizer, "chat_template", None)
    return date.today().isoformat() if "strftime_now" in str(template or "") else ""


def _check_vocabulary(tokenizer: Any, rows: int) -> None:  # noqa: ANN401
    """Refuse a tokenizer that writes tokens which the LLM has no embedding of; special ones stand in no plain text."""
    beyond = [(token, i) for token, i in tokenizer.get_vocab().items() if i >= rows]
    plain = [pair for pair in beyond if pair[1] not in tokenizer.all_special_ids]
    for token, i in plain or [pair for pair in beyond if pair[1] == tokenizer.eos_token_id]:
        raise ConfigError(
            f"the tokenizer writes {token!r:.40} as {i}, but the LLM has {rows} embeddings; pass its own tokenizer"
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

    @property
    def depth(self) -> int:
        """Tokens at most that the LLM reads one behind the other."""
        return max(len(path) for path in self.paths) - (self.gold_end is None)


def _prefix_free(candidates: list[tuple[int, ...]]) -> bool:
    ordered = sorted(candidates)
    return all(candidates) and not any(b[: len(a)] == a for a, b in itertools.pairwise(ordered))
