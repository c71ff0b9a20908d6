"""The server's own settings. Those of the engine are the package's, see `EngineConfig`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from limits import parse_many
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from agent_memory_core import InvalidSetting

PREFIX = "AGENT_MEMORY_SERVER_"

WHOLE_SECONDS = 3600.0
"""Seconds after which an answer that does not stream is given up, where nobody says otherwise."""

_OLDER_NAMES = {
    "SEMANTIC_API_KEY": "api_keys",
    "SEMANTIC_ADMIN_KEY": "admin_key",
    "SEMANTIC_SERVER_HOST": "host",
    "SEMANTIC_SERVER_PORT": "port",
    "SEMANTIC_SERVER_LOG_LEVEL": "log_level",
    "SEMANTIC_SERVER_CORS_ORIGINS": "cors_origins",
    "SEMANTIC_SERVER_RATE_LIMIT_PER_AGENT": "rate_per_session",
    "SEMANTIC_SERVER_RATE_LIMIT_GLOBAL": "rate_per_key",
}
"""Variables of the prototype that this package replaces."""


def _one_rate(value: str) -> str:
    rates = parse_many(value)
    if len(rates) != 1 or rates[0].amount < 1:
        raise ValueError("one rate above 0 is needed, such as 60/minute")
    return value


Rate = Annotated[str, AfterValidator(_one_rate)]
"""So many turns in a time, such as 60/minute."""

Words = Annotated[tuple[str, ...], NoDecode]
"""Several texts; in a variable they are separated by commas."""


class ServerSettings(BaseSettings):
    """How the server listens, whom it serves, and how much of it one client may take.

    A setting comes from the constructor, else from the variable ``AGENT_MEMORY_SERVER_<FIELD>``, else from its older
    name with ``SEMANTIC_``, else from the default.

    Raises:
        InvalidSetting: a name is unknown, or a value is outside its range.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field(default="127.0.0.1", min_length=1, description="The address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="The port; 0 takes a free one.")
    uds: Path | None = Field(
        default=None,
        description="A Unix socket to listen on in place of an address; only its owner can open it.",
    )
    api_keys: Words = Field(
        default=(),
        repr=False,
        description="Keys, one of which every request must carry; none: no key is asked for.",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="A TOML file of keys: a table for each namespace, with `sha256`, the hash of its key or a list, "
        "and with limits of its own.",
    )
    admin_key: str | None = Field(
        default=None,
        min_length=1,
        repr=False,
        description="The key that the paths under /admin and /debug ask for, in `X-Admin-Key`; none: they are closed, "
        "except on the admin socket.",
    )
    admin_socket: Path | None = Field(
        default=None,
        description="A Unix socket for the paths under /admin and /debug, which asks for no key: only its owner can "
        "open it.",
    )
    coordination_path: Path | None = Field(
        default=None,
        description="The file of the sessions of /v1/coordination; none: `coordination.db` in the folder of the store.",
    )
    insecure_no_auth: bool = Field(
        default=False,
        description="Listen on other addresses than this machine's own although there are no keys.",
    )
    allowed_hosts: Words = Field(
        default=(),
        description="Host names, beside localhost and `host`, under which browsers may reach the server.",
    )
    cors_origins: Words = Field(
        default=(),
        description="Web origins whose pages may call the server, each spelled out; * only without keys.",
    )
    model_alias: Words = Field(default=(), description="Other names by which requests may call the model.")
    keep_anonymous: bool = Field(
        default=False,
        description="Keep also what names no session: under a name made from its system prompt, its tools and its "
        "first question.",
    )
    any_model: bool = Field(
        default=False, description="Answer requests for every model with the one that is loaded."
    )
    max_tokens: int = Field(
        default=4096, ge=1, description="Most tokens of an answer whose request does not say how many."
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds after which any answer is given up; None gives up one that does not stream after "
        f"{WHOLE_SECONDS:,.0f}, and a stream never.",
    )
    ttl: float | None = Field(
        default=None,
        gt=0,
        description="Seconds without a turn after which the models are freed, until the next turn loads one again; "
        "None keeps them. Sessions on disk stay warm, and without a cache directory they are lost.",
    )
    keep_alive: float = Field(
        default=10.0, gt=0, description="Seconds of silence after which a stream carries a sign of life."
    )
    drain: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that turns get to end, and to be uploaded, when the server is stopped.",
    )
    max_in_flight: int = Field(
        default=64,
        ge=1,
        description="Most turns that run or wait; further requests are told to come back later.",
    )
    max_in_flight_per_key: int = Field(default=40, ge=1, description="The same for the requests of one key.")
    rate_per_session: Rate = Field(
        default="60/minute",
        description="Most turns of one session, such as 60/minute, where keys are asked for.",
    )
    rate_per_key: Rate = Field(
        default="1000/minute",
        description="Most turns of one key, such as 1000/minute, where keys are asked for.",
    )
    keep_days: float = Field(
        default=30.0,
        gt=0,
        description="Days for which conversations are held that a later request may go on with by an id.",
    )
    max_body_mb: float = Field(default=32.0, gt=0, description="Most MiB of a request.")
    body_timeout: float = Field(
        default=30.0, gt=0, description="Seconds within which a request must have arrived."
    )
    strip_pseudo_headers: bool = Field(
        default=True,
        description="Leave out system text that begins with x-anthropic-: Claude Code changes it with every "
        "conversation, so that no two would share their beginning.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="What is logged."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines as text, or each as a JSON object. Neither quotes a prompt."
    )
    log_prompts: Path | None = Field(
        default=None,
        description="A folder that gets a file of each request, with its body and its answer as they are; none: nobody "
        "keeps them.",
    )
    metrics_dialect: Literal["own", "vllm"] = Field(
        default="own", description="vllm repeats the metrics under the names of vLLM, for its dashboards."
    )

    def __init__(self, **values: Any) -> None:
        _refuse_unknown_variables()
        try:
            super().__init__(**values)
        except ValidationError as wrong:
            first = wrong.errors()[0]
            name = ".".join(map(str, first["loc"]))
            shown = "" if name in ("api_keys", "admin_key") else f"={first['input']!r}"
            raise InvalidSetting(
                f"the server's setting {name}{shown} is not valid: {first['msg']}."
            ) from None

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The constructor, the environment, the older names."""
        return named["init_settings"], named["env_settings"], _OlderNames(settings_cls)

    @field_validator("api_keys", "allowed_hosts", "cors_origins", "model_alias", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return (
            [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value
        )

    @model_validator(mode="after")
    def _check_origins(self) -> Self:
        if "*" in self.cors_origins and (self.api_keys or self.api_key_file):
            raise ValueError("cors_origins may be * only without keys: spell the origins out")
        return self


class _OlderNames(PydanticBaseSettingsSource):
    """Settings from the variables of the prototype."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """The value of one field, as the base class wants it."""
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """All values that are there."""
        named = {field: os.environ[name] for name, field in _OLDER_NAMES.items() if os.environ.get(name)}
        if os.environ.get("SEMANTIC_AUTH_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            # Of its own keys only. Without any, the server listens to this machine alone.
            named.pop("api_keys", None)
        for field in {"rate_per_session", "rate_per_key"} & named.keys():
            # A number of turns in a minute.
            named[field] += "/minute" if named[field].isdecimal() else ""
        if "log_level" in named:
            named["log_level"] = named["log_level"].lower()
        return named


def _refuse_unknown_variables() -> None:
    if (workers := os.environ.get("SEMANTIC_SERVER_WORKERS", "1")) not in ("", "1"):
        raise InvalidSetting(
            f"SEMANTIC_SERVER_WORKERS={workers!r} is not valid: 1, because a model is in memory once."
        )
    known = {PREFIX + name.upper() for name in ServerSettings.model_fields}
    unknown = sorted(
        name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known
    )
    if unknown:
        raise InvalidSetting(
            f"unknown environment variable {unknown[0]}: unset it, or use one of {sorted(known)}."
        )
