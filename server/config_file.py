"""Reads a config from its YAML file: what is wrong with it is one sentence."""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from server.config import Config
from server.logs import LOG_FORMAT
from tiers.errors import ConfigError


def load_config(path: Path | None, **overrides: Any) -> Config:
    """The configuration in ``path``, or the embedded model's.

    ``ASSAY_HOME`` and ``ASSAY_LOG_FORMAT`` in the environment and overrides that are not None win over the file.

    Raises:
        ConfigError: one sentence with the file, the field and what is wrong with it.
    """
    fields = _read_yaml(path) if path else {}
    if home := os.environ.get("ASSAY_HOME"):
        fields["home"] = home
    if log_format := os.environ.get(LOG_FORMAT):
        fields["log_format"] = log_format
    fields |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return Config.model_validate(fields)
    except ConfigError as error:
        raise ConfigError(f"{path or 'configuration'}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        given = "" if first["type"] == "missing" else f" (it is {first['input']!r})"
        raise ConfigError(f"{path or 'configuration'}: {where}: {first['msg']}{given}.") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not valid YAML{line}: {getattr(error, 'problem', error)}.") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold fields such as `models:`, not a {type(fields).__name__}.")
    return fields
