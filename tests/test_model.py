"""PersonaPlug against an independent reference: plain forward passes, row by row, without caches or padding."""

from contextlib import nullcontext
from threading import Thread

import pytest
import torch

from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, DataError
from persona_plug.heads.answers import combine
from persona_plug.models.caching import uncached
from persona_plug.models.fingerprint import full_digest
from persona_plug.models.llm import load_llm
from persona_plug.pairing import pair
from persona_plug.plug import PersonaPlug
from persona_plug.splice.prompts import AnswerTree
from persona_plug.splice.states import StateCache

LLMS = ("tiny-llama", "tiny-gpt2", "tiny-t5")
PLACEMENTS = ("suffix", "prefix")
CANDIDATES = {
    "disjoint": ("yes", "no", "neither"),
    "one begins another": ("1", "10", "2"),
    "a single one": ("schön 🙂",),
    "empty text": ("", "a", "ab"),
    "single tokens": ("a", "b"),
}
HEAD = "Answer as this person would: {input}"


@pytest.fixture(params=LLMS)
def llm(request):
    return request.param


@pytest.fixture(params=PLACEMENTS)
def placement(request):
    return request.param


@pytest.fixture(params=[1, 4], ids=["k=1", "k=4"])
def plug(request, make_plug, llm, placement):
    return make_plug(llm, placement=placement, user_tokens=request.param, differ=True)


def prompt(plug, request, history, personal):
    """The sequence the LLM should see: embeddings (L, H), or for an encoder-decoder its encoder's states."""
    table = plug.llm.get_input_embeddings()
    parts = plug.prompter.parts(request)
    left, right = (table(torch.tensor(ids, dtype=torch.long)) for ids in (parts.left, parts.right))
    soft = plug.soft_prompt(request, history) if personal else torch.zeros(0, left.shape[-1])
    if not plug.llm.config.is_encoder_decoder:
        return torch.cat([left, soft, right])
    encode = plug.llm.get_encoder()
    if plug.config.placement == "prefix":
        return encode(inputs_embeds=torch.cat([soft, right])[None]).last_hidden_state[0]
    return torch.cat([encode(inputs_embeds=left[None]).last_hidden_state[0], soft])


def next_token_logits(plug, start, answer):
    """Logits (len(answer) + 1, vocabulary) that predict each token of an answer and the one behind it."""
    if plug.llm.config.is_encoder_decoder:
        decoder = torch.tensor([[plug.llm.config.decoder_start_token_id, *answer]])
        return plug.llm(encoder_outputs=(start[None],), decoder_input_ids=decoder, use_cache=False).logits[0]
    table = plug.llm.get_input_embeddings()
    whole = torch.cat([start, table(torch.tensor(answer, dtype=torch.long))])
    return plug.llm(inputs_embeds=whole[None], use_cache=False).logits[0, len(start) - 1 :]


@torch.no_grad()
def reference_score(plug, request, candidates, history, personal=True):
    ids = [plug.tokenizer(c, add_special_tokens=False)["input_ids"] for c in candidates]
    begins = any(i != j and b[: len(a)] == a for i, a in enumerate(ids) for j, b in enumerate(ids))
    end = [plug.tokenizer.eos_token_id] if begins or len(ids) == 1 else []
    start = prompt(plug, request, history, personal)
    scores = []
    for answer in ids:
        wanted = [*answer, *end]
        logp = next_token_logits(plug, start, answer).float().log_softmax(-1)
        scores.append(sum(float(logp[i, token]) for i, token in enumerate(wanted)))
    return torch.tensor(scores)


@torch.no_grad()
def reference_greedy(plug, request, history, count, personal=True):
    """Greedy decoding of exactly `count` tokens by one plain forward a token; the end token is not allowed."""
    start, answer = prompt(plug, request, history, personal), []
    for _ in range(count):
        logits = next_token_logits(plug, start, answer)[-1]
        logits[plug.tokenizer.eos_token_id] = float("-inf")
        answer.append(int(logits.argmax()))
    return plug.tokenizer.decode(answer, skip_special_tokens=True).strip()


def six(**options):
    return {"min_new_tokens": 6, "max_new_tokens": 6, **options}


# Scores


@pytest.mark.parametrize("kind", CANDIDATES)
def test_score_equals_plain_forwards(plug, people, kind):
    candidates = CANDIDATES[kind]
    scores = plug.score(people.requests, candidates, people.histories)
    assert scores.shape == (len(people.requests), len(candidates))
    assert scores.dtype == torch.float32
    expected = [reference_score(plug, r, candidates, h) for r, h in zip(people.requests, people.histories, strict=True)]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=0)


def test_a_row_alone_equals_the_row_in_a_batch(plug, people):
    candidates = CANDIDATES["one begins another"]
    together = plug.score(people.requests, candidates, people.histories)
    in_threes = plug.score(people.requests, candidates, people.histories, batch_size=3)
    pairs = zip(people.requests, people.histories, strict=True)
    alone = torch.cat([plug.score(r, candidates, h) for r, h in pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(in_threes, alone, atol=1e-4, rtol=0)


def test_users_differ_and_nothing_else_does(plug, people):
    """The comparisons of this file are worth something only if a user's history moves the scores."""
    candidates = CANDIDATES["disjoint"]
    ann, bob, none, again = plug.score(["rate this"] * 4, candidates, [people.ann, people.bob, [], people.ann])
    assert (ann - bob).abs().max() > 1e-2
    assert (ann - none).abs().max() > 1e-2
    torch.testing.assert_close(ann, again, atol=1e-5, rtol=0)
    plain = plug.score(["rate this"] * 2, candidates, [people.ann, people.bob], personal=False)
    torch.testing.assert_close(plain[0], plain[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("template", ["{input}", HEAD, "{input} Answer:"])
def test_a_common_instruction_changes_only_the_cost(make_plug, people, llm, placement, template):
    plug = make_plug(llm, placement=placement, template=template, max_input_tokens=80, differ=True)
    scores = plug.score(people.requests, ("yes", "yes!", "no"), people.histories)
    pairs = zip(people.requests, people.histories, strict=True)
    expected = torch.stack([reference_score(plug, r, ("yes", "yes!", "no"), h) for r, h in pairs])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("template", ["{input}", HEAD])
def test_sliding_window_layers_see_what_they_should(make_plug, tiny_gemma, people, placement, template):
    plug = make_plug(tiny_gemma, placement=placement, template=template, max_input_tokens=80, differ=True)
    for candidates in (CANDIDATES["one begins another"], ("a longer answer", "another")):
        scores = plug.score(people.requests, candidates, people.histories)
        pairs = zip(people.requests, people.histories, strict=True)
        expected = torch.stack([reference_score(plug, r, candidates, h) for r, h in pairs])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_sliding_window_matters(make_plug, tiny_gemma, people):
    """Otherwise the test above could not fail."""
    plug = make_plug(tiny_gemma, differ=True)
    wide = plug.score(people.requests[1], ("yes", "no"), people.ann)
    config, modules = plug.llm.config, [m for m in plug.llm.modules() if getattr(m, "sliding_window", None)]
    with pytest.MonkeyPatch.context() as patch:
        for part in (config, *modules):
            patch.setattr(part, "sliding_window", 4)
        narrow = plug.score(people.requests[1], ("yes", "no"), people.ann)
    assert (wide - narrow).abs().max() > 1e-3


def test_plain_llm_is_the_llm(plug, people):
    """`personal=False` on input_ids, through nothing of the library's but the prompt."""
    candidates = ("yes", "no")
    scores = plug.score(people.requests, candidates, people.histories, personal=False)
    texts = plug.generate(people.requests, people.histories, personal=False, **six())
    for row, request in enumerate(people.requests):
        parts = plug.prompter.parts(request)
        ids = torch.tensor([[*parts.left, *parts.right]])
        for column, candidate in enumerate(candidates):
            answer = plug.tokenizer(candidate, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                if plug.llm.config.is_encoder_decoder:
                    decoder = torch.tensor([[plug.llm.config.decoder_start_token_id, *answer]])
                    logits = plug.llm(input_ids=ids, decoder_input_ids=decoder).logits[0]
                else:
                    logits = plug.llm(torch.cat([ids, torch.tensor([answer])], 1)).logits[0, ids.shape[1] - 1 :]
            logp = logits.log_softmax(-1)
            expected = sum(float(logp[i, t]) for i, t in enumerate(answer))
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-4)
        mask = torch.ones_like(ids)
        out = plug.llm.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **six())
        new = out[0] if plug.llm.config.is_encoder_decoder else out[0, ids.shape[1] :]
        assert texts[row] == plug.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_rows_may_have_candidates_of_their_own(plug, people):
    """Training draws candidates row by row: trees of many sizes in one batch."""
    wanted = [("1", "10", "2"), ("yes", "no"), ("a long answer",), ("a", "b"), ("",), ("ab", "abc", "x", "y")]
    examples = pair(plug.config, people.requests, people.histories)
    batch = plug.table(examples).batch(examples)
    trees = [AnswerTree.build([plug.prompter.answer(c) for c in row], plug.prompter.eos) for row in wanted]
    with torch.no_grad():
        loglik, end, _ = plug(batch, [plug.prompter.parts(r) for r in people.requests], trees)
    for row, candidates in enumerate(wanted):
        expected = reference_score(plug, people.requests[row], candidates, people.histories[row])
        torch.testing.assert_close(loglik[row, : len(candidates)], expected, atol=1e-4, rtol=0)
        assert (loglik[row, len(candidates) :] == float("-inf")).all()
    assert (end == 0).all()


def test_the_gold_end_token_is_scored_apart(plug, people):
    """Prefix-free candidates leave end tokens out; training asks for the gold's own."""
    request, history, candidates = people.requests[1], people.ann, ("yes", "no")
    ids = [plug.prompter.answer(c) for c in candidates]
    tree = AnswerTree.build(ids, plug.prompter.eos, gold=1)
    examples = pair(plug.config, request, history)
    batch = plug.table(examples).batch(examples)
    with torch.no_grad():
        loglik, end, _ = plug(batch, [plug.prompter.parts(request)], [tree])
        logp = next_token_logits(plug, prompt(plug, request, history, True), ids[1]).log_softmax(-1)
    torch.testing.assert_close(loglik[0], reference_score(plug, request, candidates, history), atol=1e-4, rtol=0)
    assert float(end[0]) == pytest.approx(float(logp[-1, plug.prompter.eos]), abs=1e-4)


def test_the_answers_head_joins_the_llm(make_plug, people):
    """A score is the LLM's weighted log-likelihood and what the head says; each part can be had alone."""
    plug = make_plug(answers=("1", "4", "5", "10"), differ=True)
    requests, histories = ["rate this"] * 2, [people.ann, people.bob]
    scores = plug.score(requests, history=histories)
    loglik = plug.score(requests, history=histories, parts=["soft"])
    judged = plug.score(requests, history=histories, parts=["answers"])
    weight = plug.answers.llm_log_weight.exp().detach()
    torch.testing.assert_close(scores, weight * loglik + judged, atol=1e-4, rtol=1e-5)
    assert (judged[0] - judged[1]).abs().max() > 0.1
    torch.testing.assert_close(plug.score(requests, history=histories, parts=[]), plain(plug, requests))
    some = plug.score(requests, ("10", "4"), histories, parts=["soft"])  # without "1" end tokens do not count
    expected = weight * some + judged[:, [3, 1]]
    torch.testing.assert_close(plug.score(requests, ("10", "4"), histories), expected, atol=1e-4, rtol=1e-5)
    for options in ({"candidates": ("10", "other")}, {"personal": False}):  # not the plug's own answers, or no plug
        candidates = options.get("candidates", plug.config.answers)
        one = plug.score(requests, candidates, histories, personal=options.get("personal", True))
        other = plug.score(requests, candidates, histories, personal=options.get("personal", True), parts=["soft"])
        torch.testing.assert_close(one, other)


def plain(plug, requests):
    return plug.score(requests, personal=False)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"answers": ("4", "5")}, {"parts": ["words", "soft"]}, "parts='words' is not one of soft, answers"),
        (
            {"answers": ("4", "5")},
            {"parts": ["answers"], "candidates": ("4", "6")},
            "needs a plug with an answers head",
        ),
        (
            {"answers": ("4", "5"), "answer_head": False},
            {"parts": ["answers"]},
            "alone needs a plug with an answers head",
        ),
        ({"answers": ("4", "5"), "user_tokens": 0}, {"parts": ["answers"]}, "alone needs a plug with an answers head"),
    ],
)
def test_a_part_that_is_not_there_is_refused(make_plug, settings, options, message):
    with pytest.raises(ConfigError, match=message):
        make_plug(**settings).score("a", **options)


def test_the_llm_is_left_out_where_calibration_left_it_out(make_plug, people, monkeypatch):
    plug = make_plug(answers=("4", "5"), differ=True)
    judged = plug.score(people.requests, history=people.histories, parts=["answers"])
    plug.answers.llm_share.zero_()
    monkeypatch.setattr(plug.splicer, "loglik", lambda *_: pytest.fail("the LLM was asked"))
    torch.testing.assert_close(plug.score(people.requests, history=people.histories), judged)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-t5"])
@pytest.mark.parametrize("caching", [True, False])
def test_reading_the_llms_states_runs_no_more_tokens(make_plug, people, monkeypatch, name, caching):
    """The head's view of a prompt comes out of states that the scores stand on anyway."""
    plug = make_plug(name, answers=("4", "5"), differ=True)
    stack = plug.llm.get_encoder() if name == "tiny-t5" else plug.llm
    ran = []

    def count(*arguments, run=stack.forward, **options):
        rows = [t for t in (*arguments, options.get("input_ids"), options.get("inputs_embeds")) if t is not None]
        ran.append(rows[0].shape[0] * rows[0].shape[1])
        return run(*arguments, **options)

    monkeypatch.setattr(stack, "forward", count)

    def tokens(head_reads):
        plug.answers.weight[:, plug.config.encoder_dim :] = 0.1 * head_reads
        assert plug.answers.reads_prompt == head_reads
        plug.splicer.cache = StateCache(1 << 30)
        ran.clear()
        with nullcontext() if caching else uncached():
            scores = plug.score(["rate the bread of the bakery"], history=people.ann)
        return sum(ran), scores

    with torch.no_grad():
        (without, plain_scores), (with_, scores) = tokens(False), tokens(True)
    assert with_ == without > 0
    assert (scores - plain_scores).abs().max() > 1e-3


def test_choose_names_the_best_candidate(make_plug, people):
    plug = make_plug(answers=("1", "10", "5"), differ=True)
    plug.embedder.score_temperature.fill_(2.0)
    names, probabilities = plug.choose(people.requests, history=people.histories)
    scores = plug.score(people.requests, history=people.histories)
    torch.testing.assert_close(probabilities, (scores / 2).softmax(-1))
    assert names == [("1", "10", "5")[i] for i in scores.argmax(-1)]


def test_long_candidates_are_scored_whole(make_plug, people):
    """`max_answer_tokens` bounds training and generation; two candidates with one beginning are still two."""
    plug = make_plug(max_answer_tokens=4, differ=True)
    candidates = ("the same beginning, then A", "the same beginning, then B")
    scores = plug.score("x", candidates, people.ann)
    torch.testing.assert_close(scores[0], reference_score(plug, "x", candidates, people.ann), atol=1e-4, rtol=0)


def test_bfloat16_llm(make_plug, people):
    dense = make_plug(differ=True)
    llm, tokenizer = load_llm("tiny-llama", dtype="bfloat16", device="cpu")
    plug = PersonaPlug.join(dense.config, llm, tokenizer, dense.encoder)
    assert plug.config.llm_fingerprint == dense.config.llm_fingerprint
    plug.embedder.load_state_dict(dense.embedder.state_dict())
    scores = plug.score(people.requests, ("yes", "no"), people.histories)
    expected = dense.score(people.requests, ("yes", "no"), people.histories)
    assert (scores - expected).abs().max() < 0.5
    assert all(isinstance(t, str) for t in plug.generate(people.requests, people.histories, **six()))


# Generation


def test_greedy_equals_plain_forwards(plug, people):
    texts = plug.generate(people.requests, people.histories, **six())
    pairs = zip(people.requests, people.histories, strict=True)
    assert texts == [reference_greedy(plug, r, h, 6) for r, h in pairs]
    assert any(texts)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_alone_equals_greedy_in_a_batch(plug, people, monkeypatch, side):
    monkeypatch.setattr(plug.tokenizer, "padding_side", side)
    together = plug.generate(people.requests, people.histories, **six())
    alone = [plug.generate(r, h, **six()) for r, h in zip(people.requests, people.histories, strict=True)]
    assert together == alone
    assert together == plug.generate(people.requests, people.histories, batch_size=4, **six())


def test_greedy_on_sliding_windows(make_plug, tiny_gemma, people, placement):
    plug = make_plug(tiny_gemma, placement=placement, differ=True)
    texts = plug.generate(people.requests, people.histories, **six())
    pairs = zip(people.requests, people.histories, strict=True)
    assert texts == [reference_greedy(plug, r, h, 6) for r, h in pairs]


def test_beam_search_equals_the_llms_own(make_plug, llm, placement, people):
    from transformers.modeling_outputs import BaseModelOutput

    plug = make_plug(llm, placement=placement, differ=True)
    texts = plug.generate(people.requests, people.histories, num_beams=3, **six())
    for text, request, history in zip(texts, people.requests, people.histories, strict=True):
        with torch.no_grad():
            start = prompt(plug, request, history, True)[None]
            given = {"inputs_embeds": start}
            if plug.llm.config.is_encoder_decoder:
                given = {"encoder_outputs": BaseModelOutput(last_hidden_state=start)}
            mask = torch.ones(start.shape[:2], dtype=torch.long)
            out = plug.llm.generate(**given, attention_mask=mask, num_beams=3, do_sample=False, pad_token_id=0, **six())
        assert text == plug.tokenizer.decode(out[0], skip_special_tokens=True).strip()


def test_sampling_follows_the_seed(make_plug, llm, people):
    plug = make_plug(llm, differ=True)

    def sample(seed):
        torch.manual_seed(seed)
        return plug.generate(people.requests, people.histories, do_sample=True, temperature=3.0, **six())

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}], ids=["sampling", "beams"])
def test_several_answers_to_each_request(make_plug, llm, people, options):
    plug = make_plug(llm, differ=True)
    inputs, histories = people.requests[:3], people.histories[:3]
    texts = plug.generate(inputs, histories, num_return_sequences=2, **six(**options))
    assert len(texts) == 6
    details = plug.generate(inputs, histories, num_return_sequences=2, return_details=True, **six(**options))
    assert [len(d.weights) for d in details] == [5, 5, 0, 0, 1, 1]
    one = plug.generate(inputs[0], histories[0], num_return_sequences=2, **six(**options))
    assert isinstance(one, list)
    assert len(one) == 2
    if "num_beams" in options:
        assert texts[:2] == one


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_streaming_gives_the_text(make_plug, llm, placement, people, skip_prompt):
    from transformers import TextIteratorStreamer

    plug = make_plug(llm, placement=placement, differ=True)
    expected = plug.generate("rate this", people.ann, **six())
    streamer = TextIteratorStreamer(plug.tokenizer, skip_prompt=skip_prompt, timeout=60, skip_special_tokens=True)
    thread = Thread(target=plug.generate, args=("rate this", people.ann), kwargs=six(streamer=streamer))
    thread.start()
    assert "".join(streamer).strip() == expected
    thread.join()


def test_text_gives_text_and_list_gives_list(make_plug, people):
    plug = make_plug(differ=True)
    text = plug.generate("rate this", people.ann)
    assert isinstance(text, str)
    assert plug.generate(["rate this"], people.ann) == [text]
    assert plug.generate(["rate this"] * 2, people.ann) == [text] * 2
    assert plug.generate("rate this", people.ann, return_details=True).text == text


def test_details_tell_weights_and_what_was_cut(make_plug, llm, placement, people):
    plug = make_plug(llm, placement=placement, max_history=3, max_input_tokens=20, differ=True)
    requests = ["short", "a request that is much longer than twenty tokens"]
    short, long = plug.generate(requests, [people.bob, people.ann], return_details=True)
    assert (short.input_tokens_cut, short.items_dropped) == (0, 0)
    assert (long.input_tokens_cut, long.items_dropped) == (len(requests[1]) - 20, 2)
    for detail, history in ((short, people.bob), (long, people.ann)):
        weights = [w for _, w in detail.weights]
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) <= 1 + 1e-6
        assert min(weights) >= 0
        assert {item for item, _ in detail.weights} == set(history[-3:])
    frame = len(plug.prompter.parts("").left) + len(plug.prompter.parts("").right)
    assert short.prompt_tokens == frame + len("short") + plug.config.soft_tokens
    assert long.prompt_tokens == frame + 20 + plug.config.soft_tokens
    plain = plug.generate("short", people.ann, personal=False, return_details=True)
    assert (plain.weights, plain.prompt_tokens) == ([], frame + len("short"))


def test_weights_belong_to_their_items(make_plug, people):
    """Weights in a padded batch are those of the embedder, item by item."""
    plug = make_plug(differ=True)
    details = plug.generate(people.requests, people.histories, return_details=True)
    for detail, request, history in zip(details, people.requests, people.histories, strict=True):
        examples = pair(plug.config, request, history)
        with torch.no_grad():
            weights = plug.embed(plug.table(examples).batch(examples)).weights[0]
        expected = dict(zip(history, weights.tolist(), strict=False))
        assert dict(detail.weights) == pytest.approx(expected, abs=1e-5)


# Histories and inputs


def test_items_may_be_mappings_items_or_texts(make_plug, people):
    plug = make_plug(differ=True)
    mappings = [{"input": i.input, "output": i.output, "rating": "kept, not used"} for i in people.bob]
    torch.testing.assert_close(plug.soft_prompt("x", mappings), plug.soft_prompt("x", people.bob))
    texts = ["my own words", "and more of them"]
    outputs = [HistoryItem("", text) for text in texts]
    torch.testing.assert_close(plug.soft_prompt("x", texts), plug.soft_prompt("x", outputs))
    torch.testing.assert_close(plug.soft_prompt("x", [{"output": t} for t in texts]), plug.soft_prompt("x", outputs))


def test_only_the_latest_items_count(make_plug, people):
    plug = make_plug(max_history=2, differ=True)
    torch.testing.assert_close(plug.soft_prompt("x", people.ann), plug.soft_prompt("x", people.ann[-2:]))
    assert not torch.allclose(plug.soft_prompt("x", people.ann), plug.soft_prompt("x", people.ann[:2]))


def test_soft_prompt_is_a_plain_tensor(plug, people):
    for history in (None, [], people.one, people.many):
        soft = plug.soft_prompt("a request", history)
        assert soft.shape == (plug.config.soft_tokens, plug.config.llm_width)
        assert soft.dtype == torch.float32
        assert soft.layout == torch.strided
        assert soft.device.type == "cpu"
        assert not soft.requires_grad
        assert torch.isfinite(soft).all()
    torch.testing.assert_close(plug.soft_prompt("a request", None), plug.soft_prompt("a request", []))


@pytest.mark.parametrize(
    ("inputs", "history", "message"),
    [
        ([], None, "no input"),
        ([1], None, "must be texts"),
        (["a", "b"], [["one"]], "2 inputs but 1 histories"),
        ("a", [{"input": "no output"}], "output"),
        ("a", [{"input": "x", "output": " "}], "output"),
        ("a", [3], "not 3"),
        ("a", "one text instead of a list", "history"),
        ("a", {"input": "one item", "output": "instead of a list"}, "history"),
    ],
)
def test_unusable_inputs_are_refused(make_plug, inputs, history, message):
    plug = make_plug()
    with pytest.raises(DataError, match=message):
        plug.generate(inputs, history)


def test_score_needs_candidates(make_plug):
    with pytest.raises(ConfigError, match="candidates"):
        make_plug().score("a")


def test_one_text_is_no_list_of_candidates(make_plug):
    with pytest.raises((ConfigError, DataError), match="candidates"):
        make_plug().score("a", "yes")


def test_build_takes_names(people):
    plug = PersonaPlug.build("tiny-llama", "tiny-encoder", device="cpu", user_tokens=2, recipe="mean")
    assert plug.config.aggregator == "mean"
    assert plug.soft_prompt("a", people.ann).shape == (6, 64)
    with pytest.raises(ConfigError, match="unknown setting 'colour'"):
        PersonaPlug.build("tiny-llama", "tiny-encoder", colour=1)


@pytest.mark.parametrize("answers", [None, ("4", "5")])
def test_only_embedder_and_heads_are_part_of_the_module(make_plug, answers):
    plug = make_plug(answers=answers)
    parts = {"embedder": plug.embedder} | ({"answers": plug.answers} if answers else {})
    assert {id(p) for p in plug.parameters()} == {id(p) for part in parts.values() for p in part.parameters()}
    assert set(plug.state_dict()) == {f"{name}.{key}" for name, part in parts.items() for key in part.state_dict()}


def test_the_seed_draws_the_untrained_plug(make_plug):
    a, b, c = (make_plug(seed=s).embedder.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["tokens"], c["tokens"])
    before = torch.random.get_rng_state()
    make_plug(seed=3)
    assert torch.equal(before, torch.random.get_rng_state())


# Gradients and the frozen LLM


def loss_of(plug, people):
    """A loss as in training: candidates with a gold answer, its end token and the prior."""
    examples = pair(plug.config, people.requests, people.histories)
    batch = plug.table(examples).batch(examples)
    parts = [plug.prompter.parts(r) for r in people.requests]
    ids = [plug.prompter.answer(a) for a in plug.config.answers]
    loglik, end, bias = plug(batch, parts, [AnswerTree.build(ids, plug.prompter.eos, gold=0)] * len(examples))
    scores = combine(plug.answers, loglik, bias)
    return -(scores.log_softmax(-1)[:, 0] + 0.1 * loglik[:, 0] + 0.1 * end).mean()


@pytest.mark.parametrize("recipe", ["default", "mean", "paper"])
def test_gradients_reach_every_embedder_parameter_and_nothing_else(make_plug, llm, people, recipe):
    plug = make_plug(llm, recipe=recipe, answers=("4", "5", "no"), differ=True)
    loss_of(plug, people).backward()
    learns = {n: p for n, p in plug.embedder.named_parameters() if p.requires_grad and p.numel()}
    fixed = {n for n, p in plug.embedder.named_parameters() if not p.requires_grad}
    assert not fixed
    assert [n for n, p in learns.items() if p.grad is None or not p.grad.any()] == []
    assert all(torch.isfinite(p.grad).all() for p in learns.values())
    frozen = [*plug.llm.parameters(), *plug.encoder.model.parameters()]
    assert frozen
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.parametrize("template", ["{input}", HEAD])
def test_reused_states_change_neither_loss_nor_gradients(make_plug, llm, placement, people, template):
    def run(budget, rounds):
        plug = make_plug(
            llm, placement=placement, template=template, max_input_tokens=80, answers=("4", "5", "no"), differ=True
        )
        plug.splicer.cache = StateCache(budget)
        for _ in range(rounds):
            plug.zero_grad()
            loss = loss_of(plug, people)
            loss.backward()
        return plug, loss.detach(), {n: p.grad for n, p in plug.embedder.named_parameters()}

    reused, loss, grads = run(1 << 30, 2)
    fresh, loss_0, grads_0 = run(0, 1)
    torch.testing.assert_close(loss, loss_0, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_0[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert fresh.splicer.cache.used == 0
    if placement == "suffix":
        assert reused.splicer.cache.hits >= len(set(people.requests))
        assert reused.splicer.cache.used > 0


def test_suffix_gradients_equal_those_of_one_plain_forward(make_plug, people):
    """The states of the input carry no gradient; the loss must not notice."""
    plug = make_plug(answers=("4", "5", "no"), answer_head=False, differ=True)
    loss_of(plug, people).backward()
    grads = {n: p.grad.clone() for n, p in plug.embedder.named_parameters()}
    plug.zero_grad()
    examples = pair(plug.config, people.requests, people.histories)
    soft = plug.embed(plug.table(examples).batch(examples)).soft
    table, losses = plug.llm.get_input_embeddings(), []
    ids = [plug.prompter.answer(a) for a in plug.config.answers]
    for row, request in enumerate(people.requests):
        parts = plug.prompter.parts(request)
        start = torch.cat([table(torch.tensor(parts.left)), soft[row], table(torch.tensor(parts.right))])
        logps = [next_token_logits(plug, start, list(i)).log_softmax(-1) for i in ids]
        scores = torch.stack([sum(logp[j, t] for j, t in enumerate(i)) for logp, i in zip(logps, ids, strict=True)])
        losses.append(-(scores.log_softmax(-1)[0] + 0.1 * scores[0] + 0.1 * logps[0][-1, plug.prompter.eos]))
    torch.stack(losses).mean().backward()
    for name, parameter in plug.embedder.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-3)


def test_state_cache_keeps_to_its_budget(make_plug, people):
    plug = make_plug(differ=True)
    expected = plug.score(people.requests, ("yes", "no"), people.histories)
    whole = plug.splicer.cache.used
    assert whole == sum(s.numel() * s.element_size() for s in plug.splicer.cache._states.values()) > 0
    for budget in (0, whole // 3, whole):
        plug.splicer.cache = cache = StateCache(budget)
        for _ in range(2):
            scores = plug.score(people.requests, ("yes", "no"), people.histories)
            torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
            assert cache.used <= budget
        assert bool(cache.used) == bool(budget)
    cache.clear()
    assert cache.used == 0
    assert cache._states == {}


def test_another_template_finds_no_stale_states(make_plug, people):
    """States are kept without the positions that all prompts share, so they belong to one template."""
    plug = make_plug("tiny-gpt2", template=HEAD, differ=True)
    plug.score("rate this", ("yes", "no"), people.ann)
    plug.reset(plug.config.replace(template="{input}"))
    same_text = HEAD.replace("{input}", "rate this")
    scores = plug.score(same_text, ("yes", "no"), people.ann)
    torch.testing.assert_close(
        scores[0], reference_score(plug, same_text, ("yes", "no"), people.ann), atol=1e-4, rtol=0
    )


def test_the_llm_keeps_every_bit(make_plug, llm, placement, people):
    plug = make_plug(llm, placement=placement, answers=("4", "5", "no"), differ=True)
    digests = full_digest(plug.llm), full_digest(plug.encoder.model)
    size, pad = plug.llm.config.vocab_size, plug.tokenizer.pad_token
    plug.score(people.requests, history=people.histories)
    plug.generate(people.requests, people.histories, num_beams=2)
    optimizer = torch.optim.AdamW(plug.parameters(), lr=0.1)
    loss_of(plug, people).backward()
    optimizer.step()
    assert (full_digest(plug.llm), full_digest(plug.encoder.model)) == digests
    assert (plug.llm.config.vocab_size, plug.tokenizer.pad_token, len(plug.tokenizer)) == (size, pad, size)


def test_full_digest_sees_one_bit(make_plug):
    llm, _ = load_llm("tiny-llama", device="cpu")
    before = full_digest(llm)
    with torch.no_grad():
        llm.lm_head.weight.view(torch.int32)[3, 5] ^= 1
    assert full_digest(llm) != before


# --- a plug of labels


@pytest.mark.parametrize("answers", [("red", "blue", "green"), ("1", "2", "3", "4", "5"), ("yes", "yes, please")])
def test_a_label_plug_answers_with_a_label(make_plug, people, answers):
    plug = make_plug(differ=True, answers=answers)
    chosen, _ = plug.choose(people.requests, history=people.histories)
    for options in ({}, {"max_new_tokens": 1}, {"do_sample": True, "temperature": 2.0}, {"num_beams": 2}):
        assert plug.generate(people.requests, people.histories, **options) == chosen
    assert plug.generate(people.requests[0], people.histories[0]) == chosen[0]
    details = plug.generate(people.requests, people.histories, return_details=True)
    assert [row.text for row in details] == chosen
    assert [len(row.weights) for row in details] == [len(history) for history in people.histories]
    plain = plug.generate(people.requests[0], personal=False, max_new_tokens=6)
    assert plain == make_plug().generate(people.requests[0], personal=False, max_new_tokens=6)
