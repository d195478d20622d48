"""What another engine gets: soft prompts in safetensors, the embedder as ONNX, and nothing else."""

import json
import logging
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from persona_plug import PersonaPlug, export
from persona_plug.cli import app
from persona_plug.data.history import Example
from persona_plug.errors import ConfigError, DataError, MismatchError
from persona_plug.export import dense, export_onnx, export_soft_prompts

NAN = float("nan")


@pytest.fixture
def requests(people):
    return [
        Example(f"user {i % 3}", text, "", tuple(history))
        for i, (text, history) in enumerate(zip(people.requests, people.histories, strict=True))
    ]


def run(path, **inputs):
    """What ONNX Runtime makes of a graph."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (soft,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(soft)


def read(path):
    with safe_open(str(path), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# --- what may leave


@pytest.mark.parametrize(
    ("tensor", "say"),
    [
        (torch.zeros(8), "shape"),
        (torch.zeros(1, 2, 8), "shape"),
        (torch.zeros(0, 8), "shape"),
        (torch.zeros(2, 7), "shape"),
        (torch.tensor([[0.0] * 7 + [NAN]]), "NaN"),
        (torch.tensor([[0.0] * 7 + [float("inf")]]), "infinity"),
        (torch.full((1, 8), 1e300, dtype=torch.float64), "infinity"),
        (torch.zeros(2, 8).to_sparse(), "sparse"),
        (torch.zeros(2, 8, dtype=torch.int64), "int64"),
    ],
)
def test_only_dense_finite_tensors_of_the_right_shape_leave(tensor, say):
    with pytest.raises(DataError, match=say) as refusal:
        dense(tensor, 8)
    assert "\n" not in str(refusal.value)


def test_a_row_leaves_without_its_neighbours():
    users = torch.randn(5, 3, 8)
    alone = dense(users[2], 8)
    assert torch.equal(alone, users[2])
    assert alone.untyped_storage().nbytes() == 3 * 8 * 4


def test_half_precision_and_gradients_stay_behind():
    made = dense(torch.randn(8, 2, dtype=torch.bfloat16, requires_grad=True).T, 8)
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    assert not made.requires_grad


# --- soft prompts


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_soft_prompts_are_those_of_the_plug(make_plug, requests, tmp_path, placement):
    plug = make_plug(differ=True, placement=placement)
    out = export_soft_prompts(plug, requests, tmp_path / "deep" / "soft.safetensors", batch_size=4)
    tensors, metadata = read(out)
    assert set(tensors) == {f"user%20{i % 3}/{i}" for i in range(len(requests))}
    for i, example in enumerate(requests):
        wanted = plug.soft_prompt(example.input, example.history)
        torch.testing.assert_close(tensors[f"user%20{i % 3}/{i}"], wanted, atol=1e-5, rtol=0)  # another batch
    assert metadata["llm_fingerprint"] == plug.config.llm_fingerprint
    assert metadata["count"] == str(len(requests))


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_metadata_says_how_to_build_the_prompt(make_plug, requests, tmp_path, placement):
    plug = make_plug(differ=True, placement=placement)
    tensors, metadata = read(export_soft_prompts(plug, requests[:1], tmp_path / "soft.safetensors"))
    pieces = {
        "before": plug.splicer.embed(json.loads(metadata["before"])),
        "request": plug.splicer.embed(plug.prompter.ids(requests[0].input)),
        "soft": tensors["user%200/0"],
        "after": plug.splicer.embed(json.loads(metadata["after"])),
    }
    built = torch.cat([pieces[name] for name in json.loads(metadata["layout"])])
    parts = [plug.prompter.parts(requests[0].input)]
    wanted = plug.splicer.generation_inputs(parts, [tensors["user%200/0"]])["inputs_embeds"][0]
    assert torch.equal(built, wanted)


def test_requests_keep_their_own_ids_and_lengths(make_plug, people, tmp_path):
    plug = make_plug(recipe="uem", differ=True)
    asked = [Example("a/b", "x", "", tuple(people.ann), id="q 1"), Example("a/b", "x", "", (), id="q 2")]
    tensors, _ = read(export_soft_prompts(plug, asked, tmp_path / "soft.safetensors"))
    assert {key: len(soft) for key, soft in tensors.items()} == {"a%2Fb/q%201": 4 + 6, "a%2Fb/q%202": 4 + 1}


def test_soft_prompts_that_would_be_one_are_refused(make_plug, tmp_path):
    twice = [Example("ann", text, "", id="1") for text in ("x", "y")]
    with pytest.raises(DataError, match="'ann/1'"):
        export_soft_prompts(make_plug(), twice, tmp_path / "soft.safetensors")
    with pytest.raises(DataError, match="no requests"):
        export_soft_prompts(make_plug(), [], tmp_path / "soft.safetensors")
    assert not list(tmp_path.iterdir())


# --- ONNX

PLUGS = {
    "free text": {},
    "labels": {"answers": ("red", "green", "blue")},
    "mean": {"recipe": "mean"},
    "paper": {"recipe": "paper"},
    "encoder-decoder": {"llm": "tiny-t5"},
}


@pytest.mark.parametrize("name", PLUGS)
def test_onnx_gives_the_soft_tokens_of_torch(make_plug, requests, tmp_path, name):
    plug = make_plug(differ=True, **PLUGS[name])
    path = export_onnx(plug, tmp_path / "plug.onnx")
    table = plug.table(requests)
    for some in (requests, requests[1:2]):  # mixed users, then one of whom nothing is known
        batch = table.batch(some)
        inputs = {"request": batch.request, "keys": batch.keys, "values": batch.values, "mask": batch.mask}
        with torch.no_grad():
            wanted = plug.embed(batch).soft
        torch.testing.assert_close(run(path, **inputs), wanted, atol=export.TOLERANCE, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["plug.onnx"]


def test_onnx_file_holds_the_config_and_no_embeddings_of_the_llm(make_plug, tmp_path):
    import onnx

    plug = make_plug(differ=True)
    path = export_onnx(plug, tmp_path / "plug.onnx")
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(found["config"]) == json.loads(plug.config.to_json())
    row = plug.llm.get_input_embeddings().weight[200].detach()
    assert row.numpy().tobytes() not in path.read_bytes()


def test_a_graph_that_differs_is_not_written(make_plug, tmp_path, monkeypatch):
    exported = export._to_onnx

    def altered(graph, example):
        graph.embedder.log_gain.data += 0.01
        model = exported(graph, example)
        graph.embedder.log_gain.data -= 0.01
        return model

    monkeypatch.setattr(export, "_to_onnx", altered)
    with pytest.raises(MismatchError, match="differs from torch") as refusal:
        export_onnx(make_plug(recipe="mean"), tmp_path / "plug.onnx")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [{"recipe": "uem"}, {"recipe": "persoma"}, {"user_tokens": 0}, {"recipe": "paper", "train_request": True}],
)
def test_plugs_without_a_graph_are_refused(make_plug, tmp_path, settings):
    with pytest.raises(ConfigError, match="export soft prompts"):
        export_onnx(make_plug(**settings), tmp_path / "plug.onnx")


def test_missing_packages_are_named(make_plug, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(ConfigError, match=r"needs onnxscript: pip install 'persona-plug\[onnx\]'"):
        export_onnx(make_plug(), tmp_path / "plug.onnx")


def test_export_leaves_the_plug_as_it_was(make_plug, people, tmp_path, caplog):
    plug = make_plug(differ=True, recipe="mean")
    before = plug.soft_prompt("x", people.ann)
    with caplog.at_level(logging.WARNING):
        export_onnx(plug, tmp_path / "plug.onnx")
    assert torch.equal(plug.soft_prompt("x", people.ann), before)
    assert not caplog.records


# --- adapters and turns


def test_adapters_are_exported_beside_the_soft_tokens(make_plug, requests, tmp_path):
    from tests.test_lora import shaken

    plug = shaken(make_plug(differ=True, lora=2, recipe="mean"))
    _, metadata = read(export_soft_prompts(plug, requests, tmp_path / "soft" / "soft.safetensors"))
    export_onnx(plug, tmp_path / "graph" / "plug.onnx")
    for folder in (tmp_path / "soft", tmp_path / "graph"):
        state, told = read(folder / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(state[name], p) for name, p in plug.adapters.named_weights().items())
        assert told["sha256"] == metadata["adapter"] == plug.adapters.digest
    plain = read(export_soft_prompts(make_plug(), requests, tmp_path / "plain.safetensors"))[1]
    assert plain["adapter"] == ""
    assert not (tmp_path / "adapter").exists()


WRITERS = [export_onnx, lambda plug, out: export_soft_prompts(plug, [Example("a", "x", "")], out)]


@pytest.mark.parametrize("write", WRITERS)
def test_a_words_memory_cannot_be_exported(make_plug, tmp_path, write):
    with pytest.raises(ConfigError, match=r"cannot read this plug's words memory.*words=False"):
        write(make_plug(words=True), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", WRITERS)
def test_turns_cannot_be_exported(make_plug, tmp_path, write):
    with pytest.raises(ConfigError, match=r"cannot put users' items into the prompt.*retrieve=3.*retrieve=0"):
        write(make_plug(retrieve=3), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_plug_without_soft_tokens_has_none_to_export(make_plug, tmp_path):
    plug = make_plug(user_tokens=0, task_tokens=0, lora=2)
    with pytest.raises(ConfigError, match=r"no soft tokens to export.*adapter/"):
        export_soft_prompts(plug, [Example("a", "x", "")], tmp_path / "out")


# --- the command


@pytest.fixture(scope="module")
def saved(make_plug, tmp_path_factory):
    return make_plug(differ=True).save_pretrained(tmp_path_factory.mktemp("saved") / "plug")


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    file = tmp_path_factory.mktemp("events") / "events.jsonl"
    rows = [("ann", "tea or coffee", "tea"), ("bob", "rate the soup", "1"), ("bob", "rate the cake", "10")]
    file.write_text("".join(json.dumps(dict(zip(("user_id", "input", "output"), r, strict=True))) + "\n" for r in rows))
    return file


def command(*words, code=0):
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_command_exports_every_request_of_every_user(saved, events, tmp_path):
    asked = ["--input", "rate this", "--input", "x", "--history", events]
    told = json.loads(command(saved, "--out", tmp_path, *asked, "--json").stdout)
    assert told == {"soft_prompts": str(tmp_path / "soft_prompts.safetensors"), "count": 4}
    tensors, _ = read(told["soft_prompts"])
    assert set(tensors) == {"ann/0", "ann/1", "bob/0", "bob/1"}
    wanted = PersonaPlug.from_pretrained(saved, device="cpu").soft_prompt(
        "x", [{"input": "tea or coffee", "output": "tea"}]
    )
    torch.testing.assert_close(tensors["ann/1"], wanted, atol=1e-5, rtol=0)


def test_command_exports_a_graph_and_nobodys_prompt(saved, tmp_path):
    text = command(saved, "--out", tmp_path, "--onnx", "--input", "x").stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plug.onnx", "soft_prompts.safetensors"]
    assert "plug.onnx" in text
    assert list(read(tmp_path / "soft_prompts.safetensors")[0]) == ["-/0"]


def test_command_names_what_is_missing(saved, events, tmp_path):
    for words, say in [
        ([], "nothing to export"),
        (["--input", "x", "--user", "ann"], "give --history"),
        (["--input", "x", "--history", events, "--user", "eve"], "no user 'eve'"),
    ]:
        result = command(saved, "--out", tmp_path, *words, code=1)
        assert say in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
