"""What a config says of traces."""

from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tiers.errors import ConfigError

TRACES_PATH = "/v1/traces"
"""Below an OTLP/HTTP endpoint, as its specification has it."""


class TracingConfig(BaseModel):
    """Whom traces are sent to, and what of. All else is OpenTelemetry's own to say: its OTEL_… variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str = Field(
        description="Where traces are sent by OTLP over HTTP, such as http://collector:4318; engines send theirs "
        "there too. Headers that it asks for belong in OTEL_EXPORTER_OTLP_HEADERS."
    )
    sample: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="The share of requests that is traced, where no traceparent of the caller's says whether.",
    )
    prompts: bool = Field(
        default=False,
        description="Whether traces carry what callers ask and are answered. Without it no word of theirs does.",
    )

    @model_validator(mode="after")
    def _is_an_address(self) -> Self:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError("tracing.endpoint must be an http or https address such as http://collector:4318.")
        if parts.username or parts.password:
            raise ConfigError(
                "tracing.endpoint holds a password, which would be shown wherever the address is: put it into "
                "OTEL_EXPORTER_OTLP_HEADERS."
            )
        return self

    @property
    def traces_url(self) -> str:
        """Where exactly."""
        base = self.endpoint.rstrip("/")
        return base if base.endswith(TRACES_PATH) else base + TRACES_PATH
