"""The whole configuration of one server: every field says what it does; nothing here looks at the machine."""

import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from server.engines.patience import Patience
from server.launch.cluster import RayConfig
from server.logs import LogFormat
from server.model_config import ModelConfig, TierConfig, embedded
from server.tracing.settings import TracingConfig
from tiers.conformance.budget import PUBLISHED, Budget
from tiers.errors import ConfigError
from tiers.recipe import find_recipe
from tiers.source import Source
from tiers.tier import Tier, TierKind

ENGINE_PORT = 8100
"""Of `assay engine`, by default. What is written of one on another is named by it: a home may hold several."""
REDIS_OPTIONS = frozenset({"db", "ssl_ca_certs"})
"""That a URL of Redis may have; its client would take any of its own there."""


class Config(Patience):
    """The whole configuration of one server. Without a file it serves the embedded model in three tiers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="The address the gateway listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Its port; 0 takes a free one.")
    home: Path = Field(
        default=Path(".assay"),
        description="Checkpoints, certificates, logs; relative to the working directory. ASSAY_HOME overrides it.",
    )
    keys: Path | None = Field(
        default=None, description="The API keys that `assay keys` writes; by default keys.json in home."
    )
    engine_key: Path | None = Field(
        default=None,
        description="A file with the key that `assay engine` and the gateways of `launch: url` share. "
        "ASSAY_ENGINE_KEY overrides it.",
    )
    limits: str | None = Field(
        default=None,
        description="Where several gateways count the requests of keys together: redis://host:6379/0, rediss:// "
        "with TLS (?ssl_ca_certs=FILE for a CA of one's own) or unix:///path; in the process itself if absent.",
    )
    limits_password: Path | None = Field(
        default=None, description="The file with that Redis's password, which belongs into no config and no log."
    )
    workers: int = Field(
        default=1, ge=1, le=64, description="Processes of `assay gateway` that answer on the one port."
    )
    backend: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where engines run; auto asks which build of vLLM is installed."
    )
    quantize_python: Path = Field(
        default=Path(".venv-quantize/bin/python"),
        description="The Python of the quantization environment, which builds checkpoints.",
    )
    body_limit_mib: float = Field(default=8, gt=0, description="A larger request body is refused with 413.")
    first_token_timeout_s: float = Field(
        default=600, gt=0, description="A stream without its first token by then is ended; waiting counts."
    )
    token_timeout_s: float = Field(
        default=120, gt=0, description="A stream without a further token for that long is ended."
    )
    request_timeout_s: float = Field(
        default=3600, gt=0, description="An answer that is not whole by then is ended; waiting counts."
    )
    heartbeat_s: float = Field(
        default=15, gt=0, description="A stream gets a comment after that much silence, so that proxies keep it."
    )
    header_timeout_s: float = Field(
        default=10, gt=0, description="A caller who has not sent a request's line and headers by then is cut off."
    )
    body_timeout_s: float = Field(
        default=30, gt=0, description="A request body that has not all come by then is refused with 408."
    )
    keep_alive_s: float = Field(
        default=75, gt=0, description="How long a connection without requests stays open; longer than proxies do."
    )
    max_connections: int = Field(
        default=10_000,
        ge=1,
        description="Further ones get 503; fewer where too few files may be open.",
    )
    start_timeout_s: float = Field(default=1800, gt=0, description="An engine not ready by then has failed.")
    drain_grace_s: float = Field(
        default=1,
        ge=0,
        description="How long a server that was told to stop takes new requests, while /readyz says 503 already: "
        "as long as a load balancer takes to notice.",
    )
    drain_timeout_s: float = Field(
        default=600,
        ge=0,
        description="How long the requests it has accepted may then take to finish, those that wait in a queue "
        "included; and those of an engine that `assay drain` takes out of service.",
    )
    idle_after_s: float = Field(
        default=60, gt=0, description="How long a tier with `idle: sleep` stays awake after its last request."
    )
    gate: Literal["enforce", "warn", "off"] = Field(
        default="warn",
        description="What becomes of a tier that no certificate says PASS of, as it runs now: enforce refuses its "
        "requests (503), warn serves it and writes so into the log, off serves it. Every answer says how its tier "
        "stands in x-assay-certificate, and certificates are made by `assay certify`.",
    )
    certify: Literal["off", "quick", "whole"] = Field(
        default="quick",
        description="Whether tiers that no certificate speaks of are measured in the background while they serve, "
        "letting their callers go first: by the few prompts of `assay certify --quick`, or by all.",
    )
    log_format: LogFormat = Field(
        default="text",
        description="How the log is written: for people, or a JSON object a line. ASSAY_LOG_FORMAT overrides it.",
    )
    access_log: bool = Field(
        default=False, description="Whether the log has a line for every request: never what it asked."
    )
    tracing: TracingConfig | None = Field(
        default=None, description="Where OpenTelemetry's traces of requests are sent; without it there are none."
    )
    ray: RayConfig = Field(
        default_factory=RayConfig, description="The Ray cluster of tiers with `launch: ray`: its address, for one."
    )
    models: tuple[ModelConfig, ...] = Field(default_factory=embedded, min_length=1, description="What is served.")

    @field_validator("gate", "certify", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, word: object) -> object:
        return "off" if word is False else word  # as YAML reads a plain off

    @field_validator("limits")
    @classmethod
    def _limits_are_in_redis(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018  # raises if it is none
            options = parse_qs(parts.query, strict_parsing=bool(parts.query))
        except ValueError:
            raise ConfigError("limits: this is no URL; write redis://HOST:6379/0.") from None
        if parts.password is not None or "password" in options:  # and none of the sentences here repeats it
            raise ConfigError("limits: put the password into a file and name that by `limits_password`.")
        has_place = parts.path if parts.scheme == "unix" else parts.hostname
        if parts.scheme not in ("redis", "rediss", "unix") or not has_place or options.keys() - REDIS_OPTIONS:
            raise ConfigError(
                "limits: write redis://HOST:6379/0, rediss://HOST:6379/0 or unix:///PATH?db=0; the only options "
                f"are {' and '.join(sorted(REDIS_OPTIONS))}."
            )
        return url

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        # Names of files too: they are compared as the least of file systems would.
        names = [name.replace("/", "--").lower() for tier in self.tiers for name in tier.names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"models: the name {twice[0]} is given to two tiers; rename one of the models.")
        return self

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie: a folder a model, in it one a recipe."""
        return self.home / "checkpoints"

    @property
    def certificates(self) -> Path:
        """Where certificates lie, one a tier."""
        return self.home / "certificates"

    @property
    def packs(self) -> Path:
        """Where reference packs lie."""
        return self.home / "packs"

    def address_of(self, tier: Tier, port: int | None = None) -> Path:
        """Where it is written down how its first engine is reached, or that of `assay engine` on another port."""
        return self.home / "engines" / (f"{tier.slug}.json" if port is None else f"{tier.slug}-{port}.json")

    def addresses_of(self, tier: Tier) -> list[Path]:
        """Those that are there."""
        with_port = re.compile(re.escape(tier.slug) + r"(-\d+)?\.json")
        there = [each for each in (self.home / "engines").glob("*.json") if with_port.fullmatch(each.name)]
        return sorted(there, key=lambda each: (len(each.name), each.name))

    def budget_of(self, tier: Tier) -> Budget:
        """How far a tier may be from the reference."""
        return self.settings_of(tier).budget or PUBLISHED[tier.kind]

    def settings_of(self, tier: Tier) -> TierConfig:
        """What it says of that tier: the defaults of one that it does not name, as a reference may be."""
        mine = (model.tiers.get(tier.kind) for model in self.models if model.name == tier.model)
        return next((each for each in mine if each), TierConfig())

    @property
    def tiers_started(self) -> tuple[Tier, ...]:
        """Those whose engines this server starts, here or on a Ray cluster."""
        return tuple(tier for tier in self.tiers if tier.resources.launch != "url")

    def all_here(self) -> "Config":
        """The same with every tier's engines on this machine."""
        here = {"launch": "local", "urls": ()}
        models = [
            model.model_copy(
                update={"tiers": {kind: each.model_copy(update=here) for kind, each in model.tiers.items()}}
            )
            for model in self.models
        ]
        return self.model_copy(update={"models": tuple(models)})

    def reference_of(self, model: str | None) -> Tier:
        """The reference of one of the models, the first by default; it need not be served.

        Raises:
            ConfigError: there is no such model.
        """
        names = [each.name for each in self.models]
        wanted = names[0] if model is None else model
        for tier in self.tiers:
            if tier.model.lower() == wanted.lower():
                return tier.reference
        raise ConfigError(f"There is no model {model!r} in this config; the models are {', '.join(names)}.")

    @property
    def logs(self) -> Path:
        """Where engines write."""
        return self.home / "logs"

    @property
    def keys_file(self) -> Path:
        """Where API keys lie, as salted hashes."""
        return self.keys or self.home / "keys.json"

    def read_limits_password(self) -> str | None:
        """What `limits_password` holds.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.limits_password is None:
            return None
        try:
            return self.limits_password.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"limits_password: {self.limits_password} cannot be read: {error}.") from error

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Every tier of every model, best first."""
        return tuple(
            Tier(
                model=model.name,
                kind=kind,
                source=Source.parse(model.source, model.revision),
                recipe=(recipe := find_recipe(model.tiers[kind].recipe or kind.default_recipe)),
                checkpoint=(self.checkpoints / model.name.replace("/", "--") / recipe.name).absolute(),
                resources=model.tiers[kind],
                context_length=model.context_length,
            )
            for model in self.models
            for kind in TierKind
            if kind in model.tiers
        )


def choose_tiers(config: Config, names: list[str] | None) -> list[Tier]:
    """The configured tiers that a person named, by grade or in full; all without a name.

    Raises:
        ConfigError: a name is no tier's; the sentence has those there are.
    """
    if not names:
        return list(config.tiers)
    chosen = []
    for name in names:
        wanted = name.lower()
        found = [t for t in config.tiers if wanted in {t.kind.lower(), *(n.lower() for n in t.names)}]
        if not found:
            known = ", ".join(tier.name for tier in config.tiers)
            raise ConfigError(f"There is no tier {name!r} in this config; the tiers are {known}.")
        chosen += found
    return chosen
