"""`agent-memory scale`: one server on many machines."""

from __future__ import annotations

from typing import Annotated

import typer

from agent_memory_core.cli.formats import print_json
from agent_memory_core.cli.options import CacheDir, Json, Model, err, given, say
from agent_memory_core.scale import deploy as deploy_config, serve_config, status as status_of
from agent_memory_core.scale.deploy import DASHBOARD

app = typer.Typer(no_args_is_help=True, help="One server on many machines, run by Ray Serve.")

Nodes = Annotated[int, typer.Option(help="How many machines run a replica.")]
Url = Annotated[
    str | None,
    typer.Option("--cold-url", help="The bucket that they share: s3://bucket/folder.", show_default=False),
]
Host = Annotated[str, typer.Option(help="The address that every machine listens on.")]
Port = Annotated[int, typer.Option(help="The port.")]
Dashboard = Annotated[str, typer.Option(help="Ray's dashboard.")]
Dry = Annotated[
    bool, typer.Option("--print", help="Only print the configuration, which `serve deploy` takes too.")
]


@app.command()
def up(
    nodes: Nodes = 1,
    cold_url: Url = None,
    model: Model = None,
    cache_dir: CacheDir = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    drain: Annotated[float, typer.Option(help="Seconds that a machine gets to end its turns.")] = 120.0,
    dashboard: Dashboard = DASHBOARD,
    dry: Dry = False,
) -> None:
    """Start the application, or change how many machines run it, and wait until it runs.

    A turn is acknowledged when it is in the bucket, so that a machine that is lost takes none with it.
    """
    engine = given(
        cold_url=cold_url, model=model, cache_dir=str(cache_dir) if cache_dir else None, cold_ack="remote"
    )
    config = serve_config(nodes, host=host, port=port, engine=engine, drain=drain)
    if dry:
        print_json(config)
        return
    with err.status("waiting for the replicas"):
        deploy_config(config, dashboard)
    say(f"{nodes} machines serve at http://{host}:{port}")


@app.command()
def status(dashboard: Dashboard = DASHBOARD, as_json: Json = False) -> None:
    """Show what runs where."""
    found = status_of(dashboard)
    if as_json:
        print_json(found)
        return
    say(" ".join(filter(None, (found["status"], found["message"]))))
    for node, state in found["replicas"].items():
        say(f"{node}  {state}")
