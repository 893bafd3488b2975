"""What OpenTelemetry's conventions for generative AI call us and what we do; metrics and traces say it alike."""

from types import MappingProxyType

PROVIDER = "assay"
"""Whose flavour of the conventions it is; none of those they list."""
OPERATIONS = MappingProxyType(
    {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/responses": "chat"}
)
"""By path, what generates text; what only counts tokens is no operation of theirs."""
