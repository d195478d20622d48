"""`python -m eval.harness run --model persona_plug ...`: lm-evaluation-harness tasks on an LLM with a plug.

Importing this module registers the model `persona_plug` with the harness; nothing of the harness is changed. Options,
as in `--model_args plug=my-plug,history=ann.jsonl`:

    plug      folder or Hub id of a saved plug
    history   JSONL, JSON, CSV, TSV or Parquet of a user's items; without it the history is empty
    user      whose items to take, where the file holds several users
    detached  true for the LLM alone, without soft tokens: what the plug does is the difference to this
    llm, encoder, dtype, quantization, max_length; the harness's own --device and --batch_size

The soft tokens stand in front of or behind a task's context as the plug was trained to have them (see
`eval.harness.user_plug`); the request whose vector steers the plug is the context.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_plug.errors import ConfigError, DataError, PersonaPlugError

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as exc:
    raise ConfigError("eval.harness needs lm-eval: pip install 'persona-plug[harness]'") from exc

if TYPE_CHECKING:
    from eval.harness.user_plug import Row

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 2048  # the harness's own, for LLMs that state no limit
DEFAULT_NEW_TOKENS = 256  # likewise


@register_model("persona_plug")
class PluggedLM(TemplateLM):
    """A frozen LLM with a plug and one user's history, or detached, as the harness's model."""

    def __init__(
        self,
        plug: str,
        history: str | None = None,
        user: str | None = None,
        detached: bool | str = False,
        llm: str | None = None,
        encoder: str | None = None,
        dtype: str | None = None,
        quantization: Any = None,  # noqa: ANN401
        device: str | None = None,
        batch_size: int | str = 8,
        max_length: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,  # noqa: ANN401
    ) -> None:
        """Load the plug with its LLM.

        Args:
            plug: Folder or Hub id.
            history: JSONL or Parquet of the user's items; default none.
            user: Which user of the history file; needed where it holds several.
            detached: Whether to leave the soft tokens out.
            llm: Another place of the same LLM.
            encoder: Another place of the same encoder.
            dtype: Dtype of the LLM.
            quantization: `int8` or `nf4`.
            device: Device of LLM and encoder.
            batch_size: Contexts at a time; their continuations share one pass.
            max_length: Positions at most, soft tokens included; default what the LLM states.
            max_batch_size: Taken because the harness always passes it; only its automatic batch size uses it.
            unknown: Refused.

        Raises:
            ConfigError: An option is unknown or has no usable value.
            DataError: The history cannot be used.
            PersonaPlugError: The plug or its models cannot be loaded; see `PersonaPlug.from_pretrained`.
        """
        super().__init__()
        if unknown:
            raise ConfigError(f"unknown option {min(unknown)!r} of the model persona_plug; see python -m eval.harness")
        self.detached = _flag("detached", detached)
        self.batch_size = _count("batch_size", batch_size)
        from eval.harness.user_plug import UserPlug, read_history
        from persona_plug.plug import PersonaPlug

        items = read_history(Path(history), user) if history else ()
        model = PersonaPlug.from_pretrained(
            plug, llm=llm, encoder=encoder, dtype=dtype, quantization=quantization, device=device
        )
        self.name = str(plug)
        self.user_plug = UserPlug(model, items, self.detached)
        self.tokenizer = model.tokenizer
        self.backend = "seq2seq" if self.user_plug.seq2seq else "causal"
        self.max_length = _count("max_length", max_length) if max_length is not None else self._length_limit()
        self.room = self.max_length - self.user_plug.soft_tokens
        if self.room < 2:
            raise ConfigError(
                f"max_length={self.max_length} leaves no room beside {self.user_plug.soft_tokens} soft tokens"
            )
        self._device = model.llm.device

    # -- what the harness asks -------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.user_plug.plug.prompter.eos)

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context: the beginning-of-text token, else the end-of-text token."""
        begin = self.tokenizer.bos_token_id
        return int(self.eot_token_id if begin is None else begin)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results besides the options."""
        return {
            "plug": self.name,
            "detached": self.detached,
            "llm_fingerprint": self.user_plug.plug.config.llm_fingerprint,
            "soft_tokens": self.user_plug.soft_tokens,
            "history_items": len(self.user_plug.history),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ANN401
        """Tokenise as the harness's own model `hf` does: the tokenizer's default, but never two begin tokens."""
        if add_special_tokens is None:
            start = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (start and string.startswith(start))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the LLM's chat template renders it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, cut into windows that do not overlap in what they predict.

        The plug's request is empty: a text that is still to be predicted must not steer it.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        owner = []
        for i, request in enumerate(requests):
            (string,) = request.args
            rolling = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.room, 1)
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (score, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,  # noqa: ANN401
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding gives it) of each continuation, in order.

        Args:
            requests: ((context, continuation) as text or None for a window of a text, context ids, continuation ids).
            disable_tqdm: Whether to show no progress bar.

        Raises:
            DataError: A continuation is empty or does not fit the LLM.
        """
        from eval.harness.user_plug import Row, open_tree

        groups: dict[Row, list[int]] = {}
        count = 0
        for i, (texts, context, continuation) in enumerate(requests):
            # The last token is predicted and never read.
            room = self.room - (len(continuation) - 1 if self.backend == "causal" else 0)
            if not continuation or room < 1:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens: at least 1 is needed and at most {self.room} fit "
                    f"max_length={self.max_length} beside the soft tokens; change the task or raise max_length"
                )
            count += len(context) > room
            row = Row(texts[0] if texts else "", tuple(context[-room:]))
            groups.setdefault(row, []).append(i)
        _report_cut(count, len(requests))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = sorted(groups, key=lambda row: -len(row.ids))  # like lengths together; too little memory shows at once
        for batch, parts, soft in self.user_plug.batches(rows, self.batch_size, disable_tqdm, "contexts"):
            trees = [open_tree([tuple(requests[i][2]) for i in groups[row]]) for row in batch]
            scores, greedy = self.user_plug.score(parts, soft, trees)
            for row, of_row, likely in zip(batch, scores, greedy, strict=True):
                for i, score, best in zip(groups[row], of_row, likely, strict=False):
                    results[i] = (score, best)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the LLM writes after each context, up to the first of its stop texts.

        Args:
            requests: Instances with (context, {"until", "max_gen_toks", "do_sample", "temperature", ...}).
            disable_tqdm: Whether to show no progress bar.

        Raises:
            ConfigError: So many new tokens leave no room for a context.
        """
        from eval.harness.user_plug import Row

        results = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)
        for members in kinds.values():
            stops, new, options = _generation(dict(requests[members[0]].args[1]))
            room = self.room - (new if self.backend == "causal" else 0)
            if room < 1:
                raise ConfigError(f"max_gen_toks={new} leaves no room in max_length={self.max_length}; lower it")
            groups: dict[Row, list[int]] = {}
            count = 0
            for i in members:
                ids = self.tok_encode(requests[i].args[0])
                count += len(ids) > room
                groups.setdefault(Row(requests[i].args[0], tuple(ids[-room:])), []).append(i)
            _report_cut(count, len(members))
            if options["do_sample"]:  # equal contexts are drawn one by one
                rows = [row for row, same in groups.items() for _ in same]
            else:
                rows = sorted(groups, key=lambda row: -len(row.ids))
            for batch, parts, soft in self.user_plug.batches(rows, self.batch_size, disable_tqdm, "answers"):
                for row, text in zip(batch, self.user_plug.write(parts, soft, stops, new, options), strict=True):
                    for i in [groups[row].pop()] if options["do_sample"] else groups[row]:
                        results[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _length_limit(self) -> int:
        config = self.user_plug.plug.llm.config.get_text_config(decoder=True)
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if getattr(config, name, None) is not None:
                return int(getattr(config, name))
        length = self.tokenizer.model_max_length
        return int(length) if length and length < 1e9 else DEFAULT_LENGTH  # without a limit it is 1e30


def main() -> None:
    """Run the harness's own command line with the model registered; `--help` tells of the model first."""
    from lm_eval.__main__ import cli_evaluate

    if sys.argv[1:2] in (["-h"], ["--help"]):
        sys.stdout.write(f"{__doc__}\n")
    try:
        cli_evaluate()
    except PersonaPlugError as error:
        sys.exit(f"error: {error}")


def _generation(options: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Return stop texts, new tokens at most, and what else `generate` takes; greedy unless a task asks for sampling."""
    until = options.pop("until", None) or []
    stops = [s for s in ([until] if isinstance(until, str) else list(until)) if s]
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [int(options.pop(n)) for n in names if options.get(n) is not None]
    temperature = float(options.pop("temperature", None) or 0.0)
    sample = bool(options.pop("do_sample", temperature > 0))
    new = (limits or [DEFAULT_NEW_TOKENS])[0]
    if sample:
        return stops, new, {**options, "do_sample": True, "temperature": temperature or 1.0}
    return stops, new, {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _report_cut(count: int, total: int) -> None:
    if count:
        logger.warning("%d of %d contexts did not fit the LLM: their beginnings were cut", count, total)


def _flag(name: str, value: bool | str) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise ConfigError(f"{name}={value!r} must be true or false")


def _count(name: str, value: int | str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number above 0")
    return number
