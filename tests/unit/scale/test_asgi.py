"""Every answer names the node that gave it, whatever the application answers."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient

from agent_memory_core.scale.asgi import NODE_HEADER, Named


def test_every_answer_names_the_node() -> None:
    app = FastAPI()

    @app.get("/words")
    def words() -> StreamingResponse:
        return StreamingResponse(iter(["one ", "two"]), headers={"x-own": "kept"})

    with TestClient(Named(app, "node 7")) as client:
        answer = client.get("/words")
        assert answer.text == "one two"
        assert answer.headers["x-own"] == "kept"
        for found in (answer, client.get("/nowhere")):
            assert found.headers[NODE_HEADER.decode()] == "node 7"
