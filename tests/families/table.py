"""Writes docs/families.md: what becomes of every text family that transformers offers. Run by `make test-families`."""

import gc
import logging
import signal
import warnings
from pathlib import Path

import transformers
from transformers import BertModel  # noqa: F401 - a first import of the modelling code, outside of the clock

from persona_plug.errors import ConfigError
from persona_plug.splice.causal import CausalSplicer
from persona_plug.splice.families import splicer_for
from persona_plug.splice.rows import RowSplicer
from persona_plug.splice.states import StateCache
from tests.families.tiny import OTHERS, families, model_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
SECONDS = 60  # a family whose tiny model takes longer is not built
HEAD = """# LLM families

What becomes of each text family that transformers {version} offers, found with a tiny random model of it. Windows and
chunks there are shorter than the prompts. `make test-families` writes this page and runs the checks.

- *trees*: candidates share one pass as a tree, and the states of prompts are kept.
- *rows*: each candidate is a row of its own without padding, as recurrent layers, ALiBi and chunks need. It is slower.
- *encoder-decoder*: each candidate is a row of the decoder, and the encoder's states are kept.
- *not built*: no tiny model of it could be made here. It is checked like any other when a plug is made.
- *refused*: `build` says so in one line, with the reason below.

The tests compare scores, gradients and greedy texts with the LLM's own plain pass, alone and in a mixed batch, with
both placements. Up to now they ran for 27 families; the others passed the check of a plug's making alone. Families that
are not listed, and new ones, are run as rows. Each LLM is checked anew when a plug is made: a few tokens go through the
plug's path and through one plain pass, and a difference is refused. So is an encoder (BERT) without `is_decoder`.

| family | attention | run as | reason |
| --- | --- | --- | --- |
"""


def attention(config):
    """Return the kinds of layers that a config names."""
    text = config.get_text_config(decoder=True)
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    if not kinds and getattr(text, "sliding_window", None):
        kinds = ["sliding_attention"]
    return ", ".join(kind.removesuffix("_attention") for kind in kinds) or "its own"


def row(family):
    """Return a family's line of the table."""
    signal.alarm(SECONDS)
    try:
        llm = model_of(family)
    except Exception as exc:
        return f"| `{family}` | | not built | {type(exc).__name__} |"
    kind = attention(llm.config)
    try:
        made = splicer_for(llm, StateCache(0))
    except ConfigError as exc:
        if "TimeoutError" in str(exc):
            return f"| `{family}` | {kind} | not built | too large |"
        reason = str(exc).partition(" cannot carry a plug: ")[2].partition("; use a text LLM")[0]
        return f"| `{family}` | {kind} | refused | {reason.replace('|', '/')} |"
    finally:
        signal.alarm(0)
    way = {CausalSplicer: "trees", RowSplicer: "rows"}.get(type(made), "encoder-decoder")
    return f"| `{family}` | {kind} | {way} | |"


def too_slow(*_):
    raise TimeoutError


def main():
    """Write the page."""
    signal.signal(signal.SIGALRM, too_slow)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rows = []
    for family in families():
        rows.append(row(family))
        print(rows[-1], flush=True)  # noqa: T201
        gc.collect()
    others = ", ".join(f"`{name}`" for name in sorted(OTHERS))
    tail = f"\nNot text families, and checked like any other when a plug is made: {others}.\n"
    PAGE.write_text(HEAD.format(version=transformers.__version__) + "\n".join(rows) + "\n" + tail)


if __name__ == "__main__":
    main()
