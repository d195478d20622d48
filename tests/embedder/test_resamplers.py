"""UEM and PERSOMA: several tokens a user, masks, empty histories, in the embedder and through the LLM."""

import pytest
import torch

from persona_plug.embedder.resamplers import FORMS, ItemTokens, Resampler

DIM, WIDTH = 6, 8
RECIPES = ("uem", "persoma", "persoma_mlp", "persoma_transformer")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["uem", *FORMS])
def module(request):
    torch.manual_seed(0)
    return ItemTokens(DIM, WIDTH).eval() if request.param == "uem" else Resampler(request.param, DIM, WIDTH, 3).eval()


def test_a_row_is_the_same_alone_and_beside_longer_ones(module):
    values, counts = draw(3, 5, DIM), (5, 2, 0)
    mask = torch.arange(5) < torch.tensor(counts).unsqueeze(1)
    tokens, seen = module(values, mask)
    assert torch.isfinite(tokens[seen]).all()
    for row, count in enumerate(counts):
        alone, here = module(values[row : row + 1, :count], mask[row : row + 1, :count])
        torch.testing.assert_close(tokens[row][seen[row]], alone[0][here[0]], atol=1e-5, rtol=1e-5)


def test_what_is_masked_has_no_effect(module):
    values, mask = draw(2, 4, DIM), torch.tensor([[True, True, False, False], [True, False, False, False]])
    changed = torch.where(mask.unsqueeze(-1), values, draw(2, 4, DIM, seed=9))
    (tokens, seen), (other, _) = module(values, mask), module(changed, mask)
    torch.testing.assert_close(tokens[seen], other[seen], atol=1e-6, rtol=1e-6)


def test_uem_has_one_token_an_item_and_one_more_persoma_has_k(module):
    mask = torch.tensor([[True, True, False]])
    tokens, seen = module(draw(1, 3, DIM), mask)
    assert int(seen.sum()) == 3
    assert tokens.shape[-1] == WIDTH
    if isinstance(module, ItemTokens):
        assert seen.tolist() == [[True, True, True, False]]
    else:
        assert seen.all()


def test_the_order_of_items_moves_uems_tokens_and_leaves_persomas(module):
    values, mask, order = draw(1, 4, DIM), torch.ones(1, 4, dtype=torch.bool), torch.tensor([2, 0, 3, 1])
    tokens, moved = module(values, mask)[0], module(values[:, order], mask)[0]
    if isinstance(module, ItemTokens):
        torch.testing.assert_close(tokens[:, 1:][:, order], moved[:, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens[:, 0], moved[:, 0], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(tokens, moved, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_users_give_what_each_gives_alone(make_plug, people, recipe, llm):
    """Rows of different lengths share a batch without seeing each other, in scores and in generated text."""
    plug = make_plug(llm, recipe=recipe, projector_hidden=32, differ=True)
    candidates = ["yes", "no", "five"]
    together = plug.score(people.requests, candidates, people.histories)
    texts = plug.generate(people.requests, people.histories, max_new_tokens=4)
    for i, (request, history) in enumerate(zip(people.requests, people.histories, strict=True)):
        torch.testing.assert_close(together[i : i + 1], plug.score(request, candidates, history), atol=1e-4, rtol=1e-4)
        assert texts[i] == plug.generate(request, history, max_new_tokens=4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_history_matters_and_its_length_is_uems_length(make_plug, people, recipe):
    plug = make_plug(recipe=recipe, differ=True)
    ann, bob = plug.soft_prompt("x", people.ann), plug.soft_prompt("x", people.bob)
    if recipe == "uem":
        m = plug.config.shared_tokens
        lengths = [len(plug.soft_prompt("x", h)) for h in ([], people.one, people.many)]
        assert lengths == [m + 1, m + 1 + len(people.one), m + 1 + len(people.many)]
    else:
        assert ann.shape == (plug.config.soft_tokens, plug.config.llm_width)
        assert not torch.allclose(ann, bob)


@pytest.mark.parametrize("recipe", RECIPES)
def test_they_train_and_are_saved(make_plug, people, tmp_path, recipe, encoder):
    from persona_plug import PersonaPlug
    from persona_plug.data.history import Example

    plug = make_plug(recipe=recipe)
    data = [
        Example(f"u{u}", f"rate {i}", "good" if u % 2 else "bad", tuple(people.ann[: u % 4]), f"{u}-{i}")
        for u in range(8)
        for i in range(2)
    ]
    before = {k: v.clone() for k, v in plug.embedder.state_dict().items()}
    plug.fit(data, output_dir=tmp_path / "run", report=False, steps=2, batch_size=4, eval_every=1, lr=1e-2)
    moved = [k for k, v in plug.embedder.state_dict().items() if k in before and not torch.equal(v, before[k])]
    assert any(k.startswith("resampler.") for k in moved)
    plug.save_pretrained(tmp_path / "plug")
    again = PersonaPlug.from_pretrained(tmp_path / "plug", encoder=encoder, device="cpu")
    torch.testing.assert_close(again.soft_prompt("x", people.ann), plug.soft_prompt("x", people.ann))
