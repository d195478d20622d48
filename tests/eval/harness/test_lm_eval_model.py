"""The harness's model: detached it is the LLM, plugged it is the LLM with the soft tokens in their place."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval.harness.lm_eval_model import PluggedLM, main
from eval.harness.user_plug import Row
from persona_plug.errors import ConfigError, DataError, MismatchError

ROOT = Path(__file__).resolve().parents[3]
CAUSAL = ["tiny-llama", "tiny-gpt2"]
ITEMS = [{"input": "rate the soup", "output": "1"}, {"input": "rate the cake", "output": "10"}]
PAIRS = [  # contexts and continuations, as tasks make them; three share one context
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Paris, of course"),
    ("The capital of France is", " x"),
    ("", "no context at all"),
    ("Question: what is two and two?\nAnswer: ", "four"),
    ("Grüße aus Köln", " 🙂"),
    ("a", "b"),
]
# Both are float32 passes over the same numbers; the order of their sums differs, by processor too.
SAME = 5e-5


def asked(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def saved(make_plug, tmp_path_factory):
    """`saved(llm, **settings)` is the folder of a plug whose users and requests differ clearly."""
    made = {}

    def save(llm="tiny-llama", **settings):
        key = (llm, *sorted(settings.items()))
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp("plug"))
            make_plug(llm, differ=True, **settings).save_pretrained(made[key])
        return made[key]

    return save


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """File of one user's items, none of which names the user."""
    file = tmp_path_factory.mktemp("history") / "ann.jsonl"
    file.write_text("".join(json.dumps(i) + "\n" for i in ITEMS))
    return str(file)


@pytest.fixture(scope="module")
def load(saved, history):
    """`load(llm, placement=..., **options)` is the harness's model, loaded once."""
    made = {}

    def get(llm="tiny-llama", placement="suffix", detached=False, **options):
        key = (llm, placement, detached, *sorted(options.items()))
        if key not in made:
            folder = saved(llm, placement=placement)
            made[key] = PluggedLM(plug=folder, history=history, detached=detached, device="cpu", **options)
        return made[key]

    return get


@torch.no_grad()
def plain(llm, embeddings, continuation):
    """Log-likelihood of ids behind embeddings (L, H), and whether each is the likeliest, by one plain forward pass."""
    table = llm.get_input_embeddings()
    row = torch.cat([embeddings, table(torch.tensor(continuation))])[None]
    logits = llm(inputs_embeds=row, use_cache=False).logits[0, -len(continuation) - 1 : -1]
    wanted = torch.tensor(continuation)
    picked = logits.log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(picked), bool((logits.argmax(-1) == wanted).all())


def encoded(lm, context, continuation):
    if not context:
        return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
    return lm._encode_pair(context, continuation)


@pytest.mark.parametrize("llm", CAUSAL)
@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_detached_is_the_plain_llm(llm, placement, load, load_parts):
    lm = load(llm, placement, detached=True)
    model, _ = load_parts(llm)
    table = model.get_input_embeddings()
    found = lm.loglikelihood([asked(*p) for p in PAIRS], disable_tqdm=True)
    for (score, _), pair in zip(found, PAIRS, strict=True):
        context, continuation = encoded(lm, *pair)
        expected, _ = plain(model, table(torch.tensor(context)), continuation)
        assert score == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("llm", [*CAUSAL, "tiny-t5"])
def test_detached_agrees_with_the_harness_s_own_model(llm, load, load_parts):
    lm = load(llm, detached=True, max_length=48)
    model, tokenizer = load_parts(llm)
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=48)
    ours = lm.loglikelihood([asked(*p) for p in PAIRS], disable_tqdm=True)
    theirs = own.loglikelihood([asked(*p) for p in PAIRS], disable_tqdm=True)
    for (score, greedy), (expected, likely) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(expected, abs=SAME)
        assert greedy == likely
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    asks = [asked(context, options) for context, _ in PAIRS if context]
    ours, theirs = lm.generate_until(asks, disable_tqdm=True), own.generate_until(asks, disable_tqdm=True)
    if llm == "tiny-t5":  # there the harness adds the context's length to max_gen_toks, and rolls over no text
        assert all(a and b.startswith(a) for a, b in zip(ours, theirs, strict=True))
        return
    assert ours == theirs
    texts = ["short", "a text of many words that is longer than the window of this model, by far, so that it is cut"]
    ours = lm.loglikelihood_rolling([asked(t) for t in texts], disable_tqdm=True)
    theirs = own.loglikelihood_rolling([asked(t) for t in texts], disable_tqdm=True)
    assert len(lm.tok_encode(texts[1])) > 48
    assert ours == pytest.approx(theirs, abs=10 * SAME)  # sums over a hundred tokens


@pytest.mark.parametrize("llm", CAUSAL)
@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_soft_tokens_stand_where_the_plug_has_them(llm, placement, load, load_parts):
    """[context][soft][continuation], or [begin][soft][context][continuation], in one plain pass."""
    lm = load(llm, placement)
    model, tokenizer = load_parts(llm)
    table = model.get_input_embeddings()
    found = lm.loglikelihood([asked(*p) for p in PAIRS], disable_tqdm=True)
    bare = load(llm, placement, detached=True).loglikelihood([asked(*p) for p in PAIRS], disable_tqdm=True)
    for (score, greedy), (without, _), pair in zip(found, bare, PAIRS, strict=True):
        context, continuation = encoded(lm, *pair)
        soft = lm.user_plug.plug.soft_prompt(pair[0], ITEMS)
        at = len(context) if placement == "suffix" else int(context[0] == tokenizer.bos_token_id)
        left, right = (table(torch.tensor(ids, dtype=torch.long)) for ids in (context[:at], context[at:]))
        expected, likely = plain(model, torch.cat([left, soft, right]), continuation)
        assert score == pytest.approx(expected, abs=10 * SAME)  # the context's states come from a pass of their own
        assert greedy == likely
        assert abs(score - without) > 1e-3
    assert lm.user_plug.soft_tokens == lm.user_plug.plug.config.soft_tokens > 0
    # A benchmark's contexts would fill the memory that training keeps states in.
    assert lm.user_plug.plug.splicer.cache.used == 0
    assert lm.user_plug.plug.splicer.head == ()


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_a_chat_is_scored_and_answered_as_by_the_plug_itself(placement, load, make_plug):
    """Header, request and the assistant's header are recognised, so the layout is the one of training."""
    lm = load("tiny-llama", placement)
    requests = ["rate this", "what about a long evening"]
    chats = [lm.apply_chat_template([{"role": "user", "content": r}]) for r in requests]
    plug = make_plug("tiny-llama", differ=True, placement=placement)
    candidates = ["5 stars", "no"]  # neither begins the other: scores without end tokens
    wanted = plug.score(requests, candidates, [ITEMS, ITEMS], parts=["soft"])
    found = [s for s, _ in lm.loglikelihood([asked(c, a) for c in chats for a in candidates], disable_tqdm=True)]
    # The harness counts the header's line break to each continuation.
    assert [found[0] - found[1], found[2] - found[3]] == pytest.approx((wanted[:, 0] - wanted[:, 1]).tolist(), abs=1e-4)
    open_header = [c.rstrip() for c in chats]
    breaks = [s for s, _ in lm.loglikelihood([asked(c, "\n") for c in open_header], disable_tqdm=True)]
    assert [found[0] - breaks[0], found[2] - breaks[1]] == pytest.approx(wanted[:, 0].tolist(), abs=1e-4)
    answers = lm.generate_until([asked(c, {"until": [], "max_gen_toks": 6}) for c in chats], disable_tqdm=True)
    assert [a.strip() for a in answers] == plug.generate(requests, [ITEMS, ITEMS], max_new_tokens=6)


@pytest.mark.parametrize("llm", [*CAUSAL, "tiny-t5"])
def test_a_context_alone_and_in_a_batch_gives_the_same(llm, load):
    many, alone = load(llm), load(llm, batch_size=1)
    asks = [asked(*p) for p in PAIRS]
    for (a, _), (b, _) in zip(many.loglikelihood(asks, True), alone.loglikelihood(asks, True), strict=True):
        assert a == pytest.approx(b, abs=10 * SAME)
    singles = [alone.loglikelihood([ask], True)[0][0] for ask in asks]
    assert singles == pytest.approx([s for s, _ in alone.loglikelihood(asks, True)], abs=10 * SAME)


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
def test_the_history_matters_and_may_be_missing(llm, load, saved):
    lm, empty = load(llm), PluggedLM(plug=saved(llm, placement="suffix"), device="cpu")
    asks = [asked("rate this", " 5")]
    (own, _), (none, _) = lm.loglikelihood(asks, True)[0], empty.loglikelihood(asks, True)[0]
    assert math.isfinite(none)
    assert abs(own - none) > 1e-4
    assert (empty.get_model_info()["history_items"], lm.get_model_info()["history_items"]) == (0, 2)


@torch.no_grad()
def test_rolling_windows_leave_room_for_the_soft_tokens_and_are_not_steered_by_their_text(load, load_parts):
    lm = load("tiny-llama", max_length=40)
    model, _ = load_parts("tiny-llama")
    table = model.get_input_embeddings()
    text = "a text of many words that is longer than the window of this model, by far"
    ids = lm.tok_encode(text)
    room = 40 - lm.user_plug.soft_tokens
    soft = lm.user_plug.plug.soft_prompt("", ITEMS)
    total, at = 0.0, 0
    while at < len(ids):
        if at == 0:
            context, piece = [lm.prefix_token_id], ids[:room]
        else:
            piece = ids[at : at + room]
            # The last window is filled up with what stands before it.
            context = ids[at - 1 - (room - len(piece)) : at]
        total += plain(model, torch.cat([table(torch.tensor(context)), soft]), piece)[0]
        at += len(piece)
    assert len(ids) > 2 * room
    assert lm.loglikelihood_rolling([asked(text)], True)[0] == pytest.approx(total, abs=20 * SAME)


def test_generation_stops_at_a_text_a_limit_and_the_end(load):
    lm = load("tiny-llama")
    context = "Once upon a time"
    (free,) = lm.generate_until([asked(context, {"max_gen_toks": 24})], True)
    assert len(free) > 6
    stop = free[4:6]
    stopped = lm.generate_until(
        [asked(context, {"until": [stop, "never"], "max_gen_toks": 24}), asked("x", {"max_gen_toks": 2})], True
    )
    assert stopped[0] == free[: free.index(stop)]
    assert len(stopped[1]) <= 2
    assert lm.generate_until([asked(context, {"until": stop, "max_gen_toks": 24})], True) == [stopped[0]]
    calls = []
    handle = lm.user_plug.plug.llm.register_forward_hook(lambda *_: calls.append(1))
    lm.generate_until([asked(context, {"until": [stop], "max_gen_toks": 200})], True)
    handle.remove()
    assert len(calls) < 30  # it does not write on behind the stop text


def test_a_begin_token_is_added_once(load, monkeypatch):
    """The tiny tokenizers add none; this one stands for Llama's."""
    lm = load("tiny-gpt2")
    tokenizer = SimpleNamespace(
        bos_token_id=1,
        decode=lambda ids: "<s>" * len(ids),
        encode=lambda text, add_special_tokens, verbose: [1, 9] if add_special_tokens else [9],
    )
    monkeypatch.setattr(lm, "tokenizer", tokenizer)
    assert lm.tok_encode("x") == [1, 9]
    assert lm.tok_encode("<s>x") == [9]
    assert lm.tok_encode("<s>x", add_special_tokens=True) == [1, 9]
    assert lm.tok_encode("x", add_special_tokens=False) == [9]


def test_equal_contexts_are_sampled_apart(load):
    lm = load("tiny-llama")
    options = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    torch.manual_seed(0)
    drawn = lm.generate_until([asked("Once", dict(options)) for _ in range(6)], True)
    assert len(set(drawn)) > 1
    assert all(drawn)
    greedy = lm.generate_until([asked("Once", {"temperature": 0.0, "max_gen_toks": 8}) for _ in range(3)], True)
    assert len(set(greedy)) == 1


@pytest.mark.parametrize("detached", [False, True])
def test_a_long_context_loses_its_beginning_and_this_is_said(detached, load, caplog):
    lm = load("tiny-llama", detached=detached, max_length=40)
    long = "word " * 30
    with caplog.at_level(logging.WARNING):
        (score, _), _ = lm.loglikelihood([asked(long + "end", " x"), asked("short", " x")], True)
    assert "1 of 2 contexts did not fit the LLM" in caplog.text
    kept = lm.tok_encode(long + "end")[-(lm.room - len(lm.tok_encode(" x", add_special_tokens=False)) + 1) :]
    assert len(kept) + lm.user_plug.soft_tokens < len(lm.tok_encode(long))
    caplog.clear()
    tail = lm._loglikelihood_tokens([((long + "end", " x"), kept, lm.tok_encode(" x", add_special_tokens=False))], True)
    assert tail[0][0] == pytest.approx(score, abs=10 * SAME)
    assert not caplog.text
    with pytest.raises(DataError, match=f"at least 1 is needed and at most {lm.room} fit max_length=40"):
        lm.loglikelihood([asked("a", "word " * 60)], True)
    with pytest.raises(ConfigError, match="max_gen_toks=99 leaves no room in max_length=40"):
        lm.generate_until([asked("a", {"max_gen_toks": 99})], True)


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
def test_greedy_is_what_the_llm_would_write(llm, load):
    """Four tokens that the LLM writes by itself are its greedy continuation; with the first or last changed not."""
    lm = load(llm)
    row = Row("rate this", tuple(lm.tok_encode("rate this")))
    parts, request = lm.user_plug.place(row)
    plug = lm.user_plug.plug
    inputs = plug.splicer.generation_inputs([parts], plug.soft_prompt(request, ITEMS)[None])
    out = plug.llm.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    written = out[0].tolist()[-4:]
    others = [[(written[0] + 1) % 250, *written[1:]], [*written[:3], (written[3] + 1) % 250]]
    asks = [((row.text, ""), list(row.ids), c) for c in (*others, written)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asks, True)] == [False, False, True]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"detached": "maybe"}, ConfigError, "detached='maybe' must be true or false"),
        ({"batch_size": "auto"}, ConfigError, "batch_size='auto' must be a whole number above 0"),
        ({"max_length": 3}, ConfigError, "max_length=3 leaves no room beside"),
        ({"pretrained": "x"}, ConfigError, "unknown option 'pretrained' of the model persona_plug"),
        ({"history": "gone.jsonl"}, DataError, "gone.jsonl: no such file"),
        ({"llm": "tiny-gpt2"}, MismatchError, "tiny"),
    ],
)
def test_wrong_options_are_named(options, error, message, saved):
    with pytest.raises(error, match=message) as caught:
        PluggedLM(**{"plug": saved("tiny-llama", placement="suffix"), "device": "cpu", **options})
    assert "\n" not in str(caught.value)


@pytest.fixture
def task(tmp_path):
    """Folder with one multiple-choice and one generating task on local data."""
    rows = [{"q": f"Question {i}: which one?", "choices": ["red", "green"], "gold": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
    (tmp_path / "choice.yaml").write_text(
        f"task: local_choice\noutput_type: multiple_choice\ndoc_to_target: gold\ndoc_to_choice: choices\n{common}"
    )
    (tmp_path / "write.yaml").write_text(
        'task: local_write\noutput_type: generate_until\ndoc_to_target: "{{choices[gold]}}"\n'
        f'generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}\n{common}'
    )
    return tmp_path


def evaluated(model, options, folder):
    found = simple_evaluate(
        model=model,
        model_args=options,
        tasks=["local_choice", "local_write"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = [[s["filtered_resps"] for s in found["samples"][t]] for t in ("local_choice", "local_write")]
    return found["results"], samples, found["config"]


def test_ordinary_tasks_run_and_detached_gives_the_llm_s_results(task, saved, history):
    from persona_plug.models import zoo

    assert get_model("persona_plug") is PluggedLM
    options = f"plug={saved('tiny-llama', placement='suffix')},history={history}"
    bare, bare_samples, config = evaluated("persona_plug", f"{options},detached=true", task)
    theirs, their_samples, _ = evaluated("hf", f"pretrained={zoo.pull('tiny-llama')},dtype=float32", task)
    assert {t: r["acc,none"] for t, r in bare.items() if "acc,none" in r} == {
        t: r["acc,none"] for t, r in theirs.items() if "acc,none" in r
    }
    flat = [[score for doc in samples[0] for score, _ in doc] for samples in (bare_samples, their_samples)]
    assert flat[0] == pytest.approx(flat[1], abs=SAME)
    assert bare_samples[1] == their_samples[1]
    assert (config["detached"], config["soft_tokens"]) == (True, 0)
    _, with_plug, config = evaluated("persona_plug", options, task)
    assert [s for doc in with_plug[0] for s, _ in doc] != pytest.approx(flat[0], abs=1e-3)
    assert (config["detached"], config["history_items"]) == (False, 2)


def test_the_command_knows_the_model_and_its_errors_are_one_line(task, saved, monkeypatch, capsys):
    index = TaskManager.__init__
    # Without the harness's own ten thousand tasks, which take ten seconds to list.
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **k: index(self, **{**k, "include_defaults": False}))
    line = [
        "eval.harness",
        "run",
        "--model",
        "persona_plug",
        "--device",
        "cpu",
        "--include_path",
        str(task),
    ]
    line += ["--tasks", "local_choice", "--batch_size", "4", "--model_args"]
    folder = saved("tiny-llama", placement="suffix")
    monkeypatch.setattr(sys, "argv", [*line, f"plug={folder},detached=true"])
    main()
    assert "|local_choice|" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*line, f"plug={folder},history=gone.jsonl"])
    with pytest.raises(SystemExit, match=r"^error: gone.jsonl: no such file$"):
        main()


def test_without_the_harness_the_remedy_is_named():
    code = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('eval.harness', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip() == "error: eval.harness needs lm-eval: pip install 'persona-plug[harness]'"


def test_help_loads_no_torch():
    line = [sys.executable, "-X", "importtime", "-m", "eval.harness", "--help"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "usage" in result.stdout
    assert "detached  true for the LLM alone" in result.stdout
    loaded = {part.split("|")[-1].strip() for part in result.stderr.splitlines()}
    assert "lm_eval" in loaded
    assert not loaded & {"torch", "transformers", "datasets"}
