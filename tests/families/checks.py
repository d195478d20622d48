"""What must hold of an LLM around soft tokens: scores, gradients and texts are those of its own plain pass."""

import torch

from persona_plug.config import PlugConfig
from persona_plug.plug import PersonaPlug
from persona_plug.splice.chains import chains
from persona_plug.splice.prompts import AnswerTree

REQUESTS = ["x", "longer than the windows", "some"]
LABELS = ["good", "bad", "gone", "goo"]  # two begin alike, and one begins another
TEXT = ["a text of its own"]
CLOSE = {"atol": 2e-3, "rtol": 1e-3}  # sums in another order, behind logits of some tens


def check(llm, tokenizer, encoder):
    """Join a plug in both placements and compare it with the LLM alone."""
    for placement in ("prefix", "suffix"):
        config = PlugConfig("tiny", encoder.name, placement=placement, template="Say: {input}", max_answer_tokens=4)
        plug = PersonaPlug.join(config, llm, tokenizer, encoder)
        _scores(plug)
        _training(plug)
        _texts(plug)


@torch.no_grad()
def _scores(plug):
    for candidates in (LABELS, TEXT):
        mixed = plug.score(REQUESTS, candidates, [[]] * len(REQUESTS), personal=False)
        tree = AnswerTree.build(plug.prompter.candidates(candidates), plug.prompter.eos)
        expected = torch.stack([_plain(plug, request, tree) for request in REQUESTS])
        torch.testing.assert_close(mixed, expected, **CLOSE)
        torch.testing.assert_close(plug.score(REQUESTS[:1], candidates, [[]], personal=False), expected[:1], **CLOSE)


def _plain(plug, request, tree):
    """Scores of one pass a candidate over ids: no cache, no padding, no mask."""
    parts = plug.prompter.parts(request)
    ids = [*parts.left, *parts.right]
    scores = []
    for answer in chains(tree):
        if plug.llm.config.is_encoder_decoder:
            start = [plug.llm.generation_config.decoder_start_token_id]
            forced = plug.llm.generation_config.forced_bos_token_id
            start += [] if forced is None else [forced]
            decoder = torch.tensor([[*start, *answer[:-1]]])
            logits = plug.llm(input_ids=torch.tensor([ids]), decoder_input_ids=decoder, use_cache=False).logits[0]
        else:
            logits = plug.llm(input_ids=torch.tensor([[*ids, *answer[:-1]]]), use_cache=False).logits[0]
        logp = logits[-len(answer) :].log_softmax(-1)
        scores.append(logp.gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(scores)


def _training(plug):
    """Each row's loss and gradient are the same beside other rows, and what one pass over embeddings gives."""
    torch.manual_seed(0)
    parts = [plug.prompter.parts(request) for request in REQUESTS]
    ids = plug.prompter.candidates(LABELS[:3])
    trees = [AnswerTree.build(ids, plug.prompter.eos, gold=i % 3) for i in range(len(parts))]
    size = float(plug.splicer.embed(range(20, 40)).norm(dim=-1).mean())
    width = plug.config.llm_width
    start = torch.nn.functional.normalize(torch.randn(len(parts), 3, width), dim=-1) * size

    def gradient(rows, loglik):
        soft = start[rows].clone().requires_grad_()
        values = loglik(rows, soft)
        values.log_softmax(-1)[:, 0].sum().backward()
        return values.detach(), soft.grad

    def splice(rows, soft):
        return plug.splicer.loglik([parts[i] for i in rows], soft, [trees[i] for i in rows])[0]

    def plain(rows, soft):
        return torch.stack(
            [torch.stack([_embedded(plug, parts[i], s, a) for a in ids]) for i, s in zip(rows, soft, strict=True)]
        )

    values, slope = gradient([0, 1, 2], splice)
    for other in (splice,) if plug.llm.config.is_encoder_decoder else (splice, plain):
        for row in range(3):
            alone, own = gradient([row], other)
            torch.testing.assert_close(values[row], alone[0], **CLOSE)
            torch.testing.assert_close(slope[row], own[0], atol=2e-3 * float(own.abs().max()) + 1e-6, rtol=1e-2)


def _embedded(plug, parts, soft, answer):
    table = plug.splicer.embed
    rows = [table(parts.left), soft, table((*parts.right, *answer[:-1]))]
    logits = plug.llm(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits[0]
    return logits[-len(answer) :].log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


@torch.no_grad()
def _texts(plug):
    texts = plug.generate(REQUESTS, [[]] * len(REQUESTS), personal=False)
    for request, text in zip(REQUESTS, texts, strict=True):
        parts = plug.prompter.parts(request)
        ids = torch.tensor([[*parts.left, *parts.right]])
        out = plug.llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        skip = 0 if plug.llm.config.is_encoder_decoder else ids.shape[1]
        assert text == plug.tokenizer.decode(out[0, skip:], skip_special_tokens=True).strip()
