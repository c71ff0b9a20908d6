"""`agent-memory serve`: one memory for all clients that speak OpenAI's or Anthropic's dialect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_memory_core import AgentMemory, InvalidSetting
from agent_memory_core.cli.options import CacheDir, DiskBudget, Model, err, given
from agent_memory_core.manager import ManagerConfig, ModelManager

if TYPE_CHECKING:
    from agent_memory_core.server import ServerSettings


def serve(
    model: Model = None,
    models: Annotated[
        Path | None, typer.Option(help="A configuration of several models, which requests name.")
    ] = None,
    cache_dir: CacheDir = None,
    disk_budget: DiskBudget = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="The port (default: 8000).")] = None,
    uds: Annotated[
        Path | None, typer.Option(help="A Unix socket to listen on in place of an address.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A TOML file of API keys.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name for the model; repeatable.")] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Take requests for every model.")] = False,
    ttl: Annotated[
        float | None,
        typer.Option(help="Seconds without a turn after which the model is freed (default: never)."),
    ] = None,
    keep_anonymous: Annotated[
        bool, typer.Option("--keep-anonymous", help="Keep also conversations that name no session.")
    ] = False,
    max_in_flight: Annotated[
        int | None, typer.Option(help="Most turns that run or wait (default: 64).")
    ] = None,
    drain: Annotated[
        float | None, typer.Option(help="Seconds that turns get to end when it is stopped (default: 30).")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which an answer is given up (default: 3600, and never one that streams)."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web origin whose pages may call it; repeatable.")
    ] = None,
    strip_pseudo_headers: Annotated[
        bool | None,
        typer.Option(help="Leave out system text that begins with x-anthropic- (default: yes)."),
    ] = None,
    metrics_dialect: Annotated[str | None, typer.Option(help="own, or vllm for its names, too.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json (default: text).")] = None,
    log_prompts: Annotated[
        Path | None,
        typer.Option(help="A folder that gets every prompt and every answer (default: none)."),
    ] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="Listen on the network without any key.")
    ] = False,
) -> None:
    """Serve a model, or several, over HTTP to clients of OpenAI and Anthropic.

    AGENT_MEMORY_SERVER_* variables set the rest. They may also stand in a file .env in the working directory.
    """
    options = given(
        host=host,
        port=port,
        uds=uds,
        api_key_file=api_key_file,
        model_alias=tuple(alias) if alias else None,
        any_model=any_model or None,
        ttl=ttl,
        keep_anonymous=keep_anonymous or None,
        max_in_flight=max_in_flight,
        drain=drain,
        timeout=timeout,
        cors_origins=tuple(cors_origin) if cors_origin else None,
        strip_pseudo_headers=strip_pseudo_headers,
        metrics_dialect=metrics_dialect,
        log_format=log_format,
        log_prompts=log_prompts,
        insecure_no_auth=insecure_no_auth or None,
    )
    if models is not None and given(cache_dir=cache_dir, disk_budget_mb=disk_budget):
        raise InvalidSetting(
            "--cache-dir and --disk-budget-mb are of one model: with --models they stand in the parameters of each."
        )

    def opened(name: str | None) -> AgentMemory:
        return AgentMemory(**given(model=name, cache_dir=cache_dir, disk_budget_mb=disk_budget))

    _serve(options, lambda: _source(models, model, opened), opened)


def _serve(
    options: dict[str, Any],
    source_of: Callable[[], AgentMemory | ModelManager],
    opened: Callable[[str | None], AgentMemory],
) -> None:
    """Serve until a signal comes. ``options`` are settings of the server, which go before those of the environment."""
    server = _server()
    from agent_memory_core.cli.env_file import EnvFile

    env_file = EnvFile()

    def settings() -> ServerSettings:
        env_file.load()
        read: ServerSettings = server.ServerSettings(**options)
        return read

    first = settings()
    with source_of() as source:
        name = source.model_name if isinstance(source, AgentMemory) else source.default_model
        place = f"unix:{first.uds}" if first.uds else f"http://{first.host}:{first.port}"
        err.print(f"serving {name} at {place}", soft_wrap=True)
        server.serve(source, first, settings, opened)


def _source(
    models: Path | None, model: str | None, opened: Callable[[str | None], AgentMemory]
) -> AgentMemory | ModelManager:
    """What is served: the models of a configuration, or one.

    Raises:
        InvalidSetting: it cannot be used.
    """
    if models is None:
        return opened(model)
    config = ManagerConfig.from_file(models)
    named = {} if model is None else {"default_model": model}
    return ModelManager(config.replaced(**named))


def _server() -> Any:
    """The server's package.

    Raises:
        InvalidSetting: its extra is not installed.
    """
    try:
        from agent_memory_core import server
    except ModuleNotFoundError as missing:
        raise InvalidSetting(
            f"the server needs {missing.name}: pip install 'agent-memory-mlx[server]'."
        ) from missing
    return server
