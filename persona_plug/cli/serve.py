"""`persona-plug serve` and `persona-plug keys`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_plug.cli.common import (
    Device,
    Json,
    Plug,
    PlugsEncoder,
    PlugsLlm,
    Quantized,
    Url,
    one_line_errors,
    quiet,
    say,
)
from persona_plug.errors import ConfigError

if TYPE_CHECKING:
    from persona_plug.serving.gateway import Backend
    from persona_plug.serving.logs import Log

keys_app: typer.Typer = typer.Typer(help="API keys of the gateway: new, list, revoke.", no_args_is_help=True)

Keys = Annotated[Path, typer.Option("--keys", help="File of keys; it holds hashes only.")]

SHUTDOWN_SECONDS = 30
STORE_SECONDS = 8  # what the store may take to answer; a little less than the gateway waits


@one_line_errors
def serve(
    plug: Plug,
    store: Url,
    keep_text: Annotated[
        bool | None, typer.Option(help="Keep texts beside vectors; default as the store was made, at first not.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys; without it only this machine may ask.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name for clients; default the plug's folder.")] = None,
    llm: PlugsLlm = None,
    encoder: PlugsEncoder = None,
    quantization: Quantized = None,
    engine: Annotated[
        str, typer.Option(help="transformers (in this process), or the URL of a vLLM server.")
    ] = "transformers",
    adapter: Annotated[
        str, typer.Option(help="vLLM's name of the plug's LoRA adapters; default the only ones it serves.")
    ] = "",
    max_batch: Annotated[int, typer.Option(help="transformers: requests that run together.")] = 16,
    rate: Annotated[float, typer.Option(help="Requests a minute and key; 0 for any number.")] = 0,
    pending: Annotated[int, typer.Option(help="Completions in hand at once; more get 429.")] = 64,
    pending_tokens: Annotated[int, typer.Option(help="Tokens of these, read and to be written.")] = 131_072,
    timeout: Annotated[float, typer.Option(help="Seconds a completion may take.")] = 120,
    max_tokens: Annotated[int, typer.Option(help="New tokens a completion may ask for.")] = 1024,
    max_prompt: Annotated[int, typer.Option(help="Characters of a completion's messages or prompt.")] = 50_000,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.")] = 1_000_000,
    max_events: Annotated[int, typer.Option(help="Events kept of a user.")] = 10_000,
    keep_days: Annotated[float, typer.Option(help="Days after which an event is deleted; 0 keeps events.")] = 0,
    remember: Annotated[float, typer.Option(help="Seconds a completion can be accepted; 0 for never.")] = 600,
    device: Device = None,
) -> None:
    """Serve a plug over HTTP with OpenAI's API; the request's `user` says whose history is used.

    Of the environment PERSONA_PLUG_STORE is the store's URL, which may hold a password. PERSONA_PLUG_HASH_KEY keys the
    hashes that stand for users in logs; without it they change at each start. VLLM_API_KEY is sent to a vLLM server.
    """
    from persona_plug.serving.auth import check_host
    from persona_plug.serving.limits import Limits

    check_host(host, keys)
    limits = Limits(body_bytes=max_body, per_minute=rate, pending=pending, seconds=timeout, max_tokens=max_tokens,
                    prompt_characters=max_prompt, events=max_events, remember_seconds=remember,
                    tokens=pending_tokens, keep_days=keep_days)  # fmt: skip
    if max_batch < 1:
        raise ConfigError(f"max_batch={max_batch} must be at least 1")
    try:
        import uvicorn

        from persona_plug.serving.connections import CONNECTIONS, PatientProtocol
        from persona_plug.serving.gateway import Settings
        from persona_plug.serving.logs import Log
        from persona_plug.serving.routes import create_app
    except ModuleNotFoundError as exc:
        raise ConfigError(f"serving needs {exc.name}: pip install 'persona-plug[serve]'") from exc
    quiet()
    log = Log()
    _log_as_json(log)

    def load() -> Backend:
        try:
            return _load(
                plug,
                store,
                keep_text,
                llm,
                encoder,
                quantization,
                engine,
                max_batch,
                device,
                app.state.gateway,
                adapter,
            )
        except BaseException:
            server.should_exit = True
            raise

    secret = os.environ.get("PERSONA_PLUG_HASH_KEY")
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    settings = Settings(name or Path(plug).name, keys, limits, secret.encode() if secret else None, address)
    app = create_app(settings, load, log)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,  # it would hold users' ids
            server_header=False,
            http=PatientProtocol,
            limit_concurrency=CONNECTIONS + 24,  # silent connections make room before that
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    log.event("start", address=address, model=settings.model, keys=keys is not None)
    server.run()
    if app.state.gateway.failure is not None:
        raise app.state.gateway.failure


def _load(
    folder: str,
    url: str,
    keep_text: bool | None,
    llm: str | None,
    encoder: str | None,
    quantization: Any,  # noqa: ANN401
    engine: str,
    max_batch: int,
    device: str | None,
    gateway: Any,  # noqa: ANN401
    adapter: str = "",
) -> Backend:
    from persona_plug.plug import PersonaPlug
    from persona_plug.serving.gateway import Backend
    from persona_plug.store.history_store import HistoryStore

    if engine != "transformers" and not engine.startswith(("http://", "https://")):
        raise ConfigError(f"engine={engine!r:.80} is neither `transformers` nor the URL of a vLLM server")
    _check_texts(folder, url, keep_text)
    loaded = PersonaPlug.from_pretrained(folder, llm=llm, encoder=encoder, quantization=quantization, device=device)
    loaded.keep_nothing()
    if engine == "transformers":
        from persona_plug.serving.engine import TransformersEngine

        made: Any = TransformersEngine(loaded, max_batch, gateway.metrics.batch.observe)
    else:
        from persona_plug.serving.vllm import VllmEngine, VllmServer

        server = VllmServer(engine, api_key=os.environ.get("VLLM_API_KEY"), width=loaded.config.llm_width)
        made = VllmEngine(loaded, server, adapter)
    users = HistoryStore(url, encoder=loaded.encoder, keep_text=keep_text, wait=STORE_SECONDS)
    return Backend(loaded, users, made)


def _check_texts(folder: str, url: str, keep_text: bool | None) -> None:
    """Refuse, before the LLM is loaded, a store without texts under a plug that needs them."""
    from persona_plug.config import PlugConfig
    from persona_plug.errors import DataError
    from persona_plug.persistence import local_folder
    from persona_plug.store.history_store import HistoryStore

    config = PlugConfig.load(local_folder(folder))
    if not (config.remembers or config.retrieve):
        return
    try:
        with HistoryStore(url, wait=STORE_SECONDS) as opened:
            name, keeps = opened.name, opened.keep_text
    except DataError:  # there is no store yet: it is made as asked
        name, keeps = "the new store", bool(keep_text)
    if keeps:
        return
    what, cure = "reads users' own words", "fit a plug with words=False"
    if not config.remembers:
        what, cure = "puts users' items into the prompt", "fit a plug with retrieve=0"
    raise ConfigError(f"{name} keeps no texts, and this plug {what}: make the store with --keep-text, or {cure}")


def _log_as_json(log: Log) -> None:
    """Have what libraries log written as JSON too."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.event("log", logger=record.name, level=record.levelname, message=record.getMessage())

    logging.basicConfig(level=logging.WARNING, handlers=[Handler()], force=True)


@keys_app.command("new")
@one_line_errors
def keys_new(
    tenant: Annotated[str, typer.Option(help="Whose key: letters, digits, dots, dashes, underscores.")],
    keys: Keys,
    as_json: Json = False,
) -> None:
    """Make a key, add its hash to the file, and show the key this once."""
    from persona_plug.serving.auth import new_key

    key, secret = new_key(keys, tenant)
    row = {"id": key.id, "tenant": key.tenant, "key": secret}
    say(json.dumps(row) if as_json else f"{secret}\n\nThis is shown once. Revoke it by its id, {key.id}.")


@keys_app.command("list")
@one_line_errors
def keys_list(keys: Keys, as_json: Json = False) -> None:
    """Show the keys of a file."""
    from persona_plug.serving.auth import read_keys

    rows = [{k: v for k, v in dataclasses.asdict(key).items() if k != "sha256"} for key in read_keys(keys)]
    say(json.dumps(rows) if as_json else "\n".join("  ".join(row.values()) for row in rows))


@keys_app.command("revoke")
@one_line_errors
def keys_revoke(ident: Annotated[str, typer.Argument(help="The key's id.")], keys: Keys) -> None:
    """Take a key out of the file; a running gateway refuses it from then on."""
    from persona_plug.serving.auth import revoke_key

    key = revoke_key(keys, ident)
    say(f"{key.id} of {key.tenant} is revoked")
