"""What another engine needs of a plug: soft prompts as safetensors, and the embedder as ONNX."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from persona_plug.data.history import Example
from persona_plug.embedder.batch import HistoryBatch, value_dim
from persona_plug.embedder.pooled import PooledEmbedder
from persona_plug.errors import ConfigError, DataError, MismatchError
from persona_plug.files import write_atomically
from persona_plug.generation import check_wordless
from persona_plug.models.adapters import ADAPTER

if TYPE_CHECKING:
    from persona_plug.model import PlugModel

TOLERANCE = 1e-4  # between torch and ONNX; soft tokens are about as long as the LLM's embeddings, so of order 1
CHECKED = ((1, 1), (3, 7), (2, 40))  # (B, n) of the random batches a graph is checked on
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def dense(tensor: Tensor, width: int) -> Tensor:
    """Return a tensor that may leave the process: float32 on the CPU, with a storage of its own.

    A view would take the rows beside it along when it is written: those are other users'.

    Args:
        tensor: (n, H) soft tokens or a prompt's embeddings.
        width: H of the LLM.

    Raises:
        DataError: It is not a dense, finite, floating-point (n, width) with n of at least 1.
    """
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        kind = f"{tensor.dtype}, {tensor.layout}"
        raise DataError(f"embeddings must be a dense floating-point tensor, not {kind}; pass what the plug returns")
    if tensor.dim() != 2 or tensor.shape[1] != width or not tensor.shape[0]:
        raise DataError(f"embeddings must have shape (n, {width}) with n >= 1, not {tuple(tensor.shape)}")
    result = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(result).all()):
        raise DataError("embeddings hold NaN or infinity; encode the history again")
    return result


@torch.no_grad()
def export_soft_prompts(plug: PlugModel, requests: Sequence[Example], out: Path, batch_size: int = 16) -> Path:
    """Write the soft tokens of requests to a safetensors file and return its path.

    A key is `user/request`, both percent-encoded; the request is the example's id, or its number in the list. Each
    tensor is (m + k, H) float32 (`uem`: a length of its own). LoRA adapters go into the folder `adapter` beside the
    file. The metadata says which LLM, encoder, adapters and plug the soft tokens belong to and where they go: `layout`
    names the pieces of a prompt in order, and `before` and `after` are the ids of the chat template around it. The file
    holds no text, but soft tokens are personal and user ids are in the keys.

    Args:
        plug: The plug.
        requests: Requests with their users' histories.
        out: File to write.
        batch_size: Rows at a time.

    Raises:
        DataError: There is nothing to export, or two requests of a user have one id.
        ConfigError: The plug has a words memory or shows items, which soft prompts do not hold; or no soft tokens.
    """
    check_wordless(plug.config, "an engine of soft prompts")
    _check_turnless(plug)
    if not plug.config.soft_tokens:
        raise ConfigError("this plug has no soft tokens to export; its LoRA adapters lie in the folder adapter/ of it")
    from safetensors.torch import save as to_bytes

    if not requests:
        raise DataError("no requests to export soft prompts for: give at least one")
    prompts: dict[str, Tensor] = {}
    table = plug.table(requests)
    for start in range(0, len(requests), batch_size):
        part = requests[start : start + batch_size]
        for i, (example, soft) in enumerate(zip(part, plug.embed(table.batch(part)).soft, strict=True), start):
            key = f"{quote(example.user_id, safe='')}/{quote(example.id or str(i), safe='')}"
            if key in prompts:
                raise DataError(f"two requests are called {key!r}; give each request of a user an id of its own")
            prompts[key] = dense(soft, plug.config.llm_width)
    write_atomically(out, to_bytes(prompts, _identity(plug) | {"format": "pt", "count": str(len(prompts))}))
    _write_adapter(plug, out)
    return out


def export_onnx(plug: PlugModel, out: Path) -> Path:
    """Write the embedder as an ONNX graph, checked against torch, and return its path.

    Inputs, float32 unless said otherwise: `request` (B, d), `keys` (B, n, d), `values` (B, n, v), `mask` (B, n) bool
    (see `HistoryBatch`). Output: `soft` (B, m + k, H). B and n are free; an empty history is one item whose mask is
    False. The plug's config is in the file's metadata.

    Args:
        plug: The plug.
        out: File to write; it appears only when the graph has passed the check.

    Raises:
        ConfigError: A package is missing, or the plug has a words memory, shows items, or has no graph of fixed shape.
        MismatchError: The graph's soft tokens differ from torch's.
    """
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"ONNX export needs {', '.join(missing)}: pip install 'persona-plug[onnx]'")
    check_wordless(plug.config, "an ONNX graph")
    _check_turnless(plug)
    config, embedder = plug.config, plug.embedder
    if not isinstance(embedder, PooledEmbedder) or config.train_request:
        what = f"aggregator={config.aggregator!r}" if config.user_tokens else "user_tokens=0"
        what = "train_request=True" if config.train_request else what
        raise ConfigError(f"a plug with {what} has no ONNX graph; export soft prompts of its requests instead")
    graph = _Graph(copy.deepcopy(embedder).float().cpu()).eval()
    model = _to_onnx(graph, _random_inputs(graph, 2, 5))
    for key, value in _identity(plug).items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString()
    _check(graph, content)
    write_atomically(out, content)
    _write_adapter(plug, out)
    return out


def _check_turnless(plug: PlugModel) -> None:
    if plug.config.retrieve:
        raise ConfigError(
            f"an export cannot put users' items into the prompt, as this plug does (retrieve={plug.config.retrieve}); "
            "serve it with `persona-plug serve`, or fit one with retrieve=0"
        )


def _write_adapter(plug: PlugModel, out: Path) -> None:
    """Write the plug's LoRA adapters beside a file: its soft tokens are for the LLM with them."""
    if plug.adapters is not None:
        plug.adapters.save(out.parent / ADAPTER, plug.config.llm, plug.config.llm_fingerprint)


class _Graph(nn.Module):
    """The embedder's soft tokens without its look for NaN, which depends on the data and cannot be part of a graph."""

    def __init__(self, embedder: PooledEmbedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, request: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return self.embedder.soft_tokens(HistoryBatch(request, keys, values, mask), mask)[0]


def _to_onnx(graph: _Graph, example: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Return the graph as an ONNX model with free B and n."""
    batch, items = torch.export.Dim("batch"), torch.export.Dim("items")
    free: dict[str, Any] = {name: {0: batch, 1: items} for name in example}
    free["request"] = {0: batch}
    # The exporter warns of packages that this graph does not need.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            graph, kwargs=example, dynamic_shapes=free, output_names=["soft"], dynamo=True, verbose=False
        )
    return program.model_proto


def _random_inputs(graph: _Graph, b: int, n: int, noise: torch.Generator | None = None) -> dict[str, Tensor]:
    """Return a batch of unit vectors as an encoder gives them; the first row's history is empty."""
    config = graph.embedder.config
    noise = noise or torch.Generator().manual_seed(0)

    def units(*shape: int) -> Tensor:
        return nn.functional.normalize(torch.randn(*shape, config.encoder_dim, generator=noise), dim=-1)

    text, answers = value_dim(config)
    parts = [units(b, n) for _ in range(text // config.encoder_dim)]
    if answers:
        drawn = torch.randint(answers, (b, n), generator=noise)
        parts.append(nn.functional.one_hot(drawn, answers).float())
    mask = torch.rand(b, n, generator=noise) < 0.7
    mask[0] = False
    return {"request": units(b), "keys": units(b, n), "values": torch.cat(parts, -1), "mask": mask}


@torch.no_grad()
def _check(graph: _Graph, content: bytes) -> None:
    """Compare the graph with the embedder itself on random batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    noise = torch.Generator().manual_seed(1)
    for b, n in CHECKED:
        inputs = _random_inputs(graph, b, n, noise)
        expected = graph.embedder(HistoryBatch(**inputs)).soft
        (soft,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        difference = float((torch.from_numpy(soft) - expected).abs().max())
        if not difference <= TOLERANCE:  # NaN is a mismatch too
            raise MismatchError(
                f"the ONNX graph differs from torch by {difference:.2g} (at most {TOLERANCE:g} is right) for {b} "
                f"requests with {n} items; nothing was written: try other versions of torch and onnxscript"
            )


def _identity(plug: PlugModel) -> dict[str, str]:
    """Return whose soft tokens these are, and where they go in a prompt."""
    config, prompter = plug.config, plug.prompter
    suffix = config.placement == "suffix"
    pieces = ["request", "soft"] if suffix else ["soft", "request"]
    return {
        "llm_fingerprint": config.llm_fingerprint,
        "encoder_fingerprint": config.encoder_fingerprint,
        "placement": config.placement,
        "layout": json.dumps(["before", *pieces, "after"]),
        "adapter": "" if plug.adapters is None else plug.adapters.digest,
        "before": json.dumps(list(prompter.before)),
        "after": json.dumps(list(prompter.after)),
        "config": config.to_json(),
    }
