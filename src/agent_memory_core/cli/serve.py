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
    api_key_file: Annotated[Path | None, typer.Option(help="A TOML file of API keys.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name for the model; repeatable.")] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Take requests for every model.")] = False,
    ttl: Annotated[
        float | None,
        typer.Option(help="Seconds without a turn after which the model is freed (default: never)."),
    ] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option("--insecure-no-auth", help="Listen on the network without any key.")
    ] = False,
) -> None:
    """Serve a model, or several, over HTTP to clients of OpenAI and Anthropic.

    AGENT_MEMORY_SERVER_* variables set the rest. They may also stand in a file .env in the working directory.
    """
    server = _server()
    from agent_memory_core.cli.env_file import EnvFile

    env_file = EnvFile()
    options = given(
        host=host,
        port=port,
        api_key_file=api_key_file,
        model_alias=tuple(alias) if alias else None,
        any_model=any_model or None,
        ttl=ttl,
        insecure_no_auth=insecure_no_auth or None,
    )

    def settings() -> ServerSettings:
        env_file.load()
        read: ServerSettings = server.ServerSettings(**options)
        return read

    first = settings()

    def opened(name: str | None) -> AgentMemory:
        return AgentMemory(**given(model=name, cache_dir=cache_dir, disk_budget_mb=disk_budget))

    if models is not None and given(cache_dir=cache_dir, disk_budget_mb=disk_budget):
        raise InvalidSetting(
            "--cache-dir and --disk-budget-mb are of one model: with --models they stand in the parameters of each."
        )
    with _source(models, model, opened) as source:
        name = source.model_name if isinstance(source, AgentMemory) else source.default_model
        err.print(f"serving {name} at http://{first.host}:{first.port}", soft_wrap=True)
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
