"""The key that engines and the gateways of `launch: url` share: a file, or a variable of the environment."""

import os
from pathlib import Path

from tiers.errors import ConfigError

VARIABLE = "ASSAY_ENGINE_KEY"


def engine_key(file: Path | None) -> str | None:
    """The shared key; None where none is given. The variable wins over the file, as it does for other settings.

    Raises:
        ConfigError: it cannot be read, or is nothing that can be sent in a header.
    """
    where, key = VARIABLE, os.environ.get(VARIABLE)
    if key is None:
        if file is None:
            return None
        where = f"engine_key: {file}"
        try:
            key = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read ({error}).") from error
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{where} holds no key, which is one word of letters, digits and signs: make one with "
            "`openssl rand -hex 32`."
        )
    return key
