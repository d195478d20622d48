"""Shared fixtures: tiny models built once, plugs that are cheap to make, and no network.

Tests marked `real` or `network` use the user's own cache and may open connections; all others share a fresh cache.
"""

import os
import random
import socket
import sys
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; inherited by the processes tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Slow machines fail no test, and every run draws the same examples.
settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

CACHE = pytest.StashKey()


def refuse_remote(connect):
    """Wrap a socket's connect so that only loopback and local sockets work."""

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else None
        if self.family != socket.AF_UNIX and host not in ("localhost", "::1") and not str(host).startswith("127."):
            raise OSError(f"tests may not connect to {host}: mark the test `network` if it has to")
        return connect(self, address)

    return guarded


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Choose cache and network before any fixture of the test is made, those of module scope included."""
    outside = item.get_closest_marker("real") or item.get_closest_marker("network")
    with pytest.MonkeyPatch.context() as patch:
        if outside is None:
            patch.setenv("PERSONA_PLUG_CACHE", str(item.config.stash[CACHE]))
            for name in ("connect", "connect_ex"):
                patch.setattr(socket.socket, name, refuse_remote(getattr(socket.socket, name)))
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    session.config.stash[CACHE] = session.config._tmp_path_factory.mktemp("persona_plug_cache")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process waits for another's last one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers for every test, whatever ran before."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def load_parts():
    """`load_parts(llm)` gives (LLM, tokenizer), loaded once; do not change them."""
    from persona_plug.models.llm import load_llm

    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = load_llm(name, device="cpu")
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def encoder():
    """The tiny history encoder, with its vector cache."""
    from persona_plug.models.encoder import HistoryEncoder

    return HistoryEncoder("tiny-encoder", device="cpu")


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory):
    """Folder of a random Gemma 3 (text) with a sliding window of 8 tokens, shorter than any prompt of the tests."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    from persona_plug.models import zoo

    folder = tmp_path_factory.mktemp("tiny-gemma")
    config = Gemma3TextConfig(
        vocab_size=259,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo.pull("tiny-gpt2")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def perturb():
    """`perturb(plug)` randomises what an untrained plug leaves out, so that users and requests differ clearly."""
    import torch

    def perturb(plug, seed=7, scale=1.0):
        embedder = getattr(plug, "embedder", plug)
        noise = torch.Generator().manual_seed(seed)

        def draw(parameter):
            return torch.randn(parameter.shape, generator=noise).to(parameter.device)

        head = getattr(plug, "answers", None)
        with torch.no_grad():
            if head is not None:
                for name in ("weight", "offset", "llm_log_weight"):
                    getattr(head, name).add_(draw(getattr(head, name)) * 0.3)
                head.power.fill_(0.7)
            for name, parameter in embedder.named_parameters():
                if name == "out.weight":
                    # Offsets as long as the unit vectors that they are added to.
                    size = embedder.config.projector_hidden * embedder.config.llm_width
                    parameter.copy_(draw(parameter) * 4 * scale / size**0.5)
                elif name in ("null_value", "tokens"):
                    parameter.add_(draw(parameter) * 0.1)
                elif name != "hidden.weight":
                    parameter.add_(draw(parameter) * 0.3)
        return plug

    return perturb


@pytest.fixture(scope="session")
def make_plug(load_parts, encoder, perturb):
    """`make_plug(llm="tiny-llama", **settings)` joins loaded parts to an untrained plug; `differ=True` perturbs it.

    It has no words memory without `words=True` or `recipe="words"`.

    `encoder` and `seed` may be given too. LLM and encoder are shared by all plugs; the embedder and the cache of
    frozen states are a plug's own.
    """
    from persona_plug.config import PlugConfig
    from persona_plug.plug import PersonaPlug

    shared = encoder

    def make(llm="tiny-llama", *, differ=False, encoder=None, seed=0, recipe="default", **settings):
        model, tokenizer = load_parts(llm)
        used = encoder or shared
        small = {"key_dim": 16, "projector_hidden": 32, "max_input_tokens": 64, "max_answer_tokens": 16}
        small["words"] = recipe == "words"  # fitting a memory takes seconds
        config = PlugConfig.create(llm, used.name, recipe, **{**small, **settings})
        plug = PersonaPlug.join(config, model, tokenizer, used, seed=seed)
        return perturb(plug) if differ else plug

    return make


@pytest.fixture(scope="session")
def people():
    """Users with many, one and no items, and requests of many lengths that mix them.

    `histories[i]` belongs to `requests[i]`; `none`, `one` and `many` are single histories.
    """
    from persona_plug.data.history import HistoryItem

    def items(*pairs):
        return [HistoryItem(text, answer) for text, answer in pairs]

    ann = items(
        ("tea or coffee", "tea"),
        ("a book for the train", "something short, please"),
        ("rate the film", "5"),
        ("rate the play", "4"),
        ("a walk in the rain", "yes!"),
    )
    bob = items(("rate the soup", "1"), ("rate the cake", "10"), ("", "I never liked mornings"))
    eve = items(("Grüße aus Köln", "schöne Grüße 🙂"))
    requests = [
        "rate this",
        "what about a long evening with friends",
        "x",
        "rate the bread of the small bakery",
        "Köln?",
        "rate this",
    ]
    histories = [ann, [], eve, bob, bob, eve]
    return SimpleNamespace(
        none=[], one=eve, many=ann, ann=ann, bob=bob, eve=eve, requests=requests, histories=histories
    )
