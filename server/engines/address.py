"""Where an engine of a running server answers, written down for `assay certify`, which measures that very engine.

The file is its owner's alone to read: it has the engine's key.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tiers.errors import ConfigError
from tiers.files import write_whole


class Address(BaseModel):
    """One engine's."""

    model_config = ConfigDict(frozen=True)

    url: str
    key: str
    checkpoint: str
    """The digest of the manifest that it was loaded by: the files may be others by now."""

    def write(self, file: Path) -> None:
        """Put it in place of the engine's last one, whole."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, self.model_dump_json().encode(), 0o600)

    def take_away(self, file: Path) -> None:
        """Remove it, if no other server of the same home has put its own there."""
        if Address.read(file) == self:
            file.unlink(missing_ok=True)

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """None where no engine is written down.

        Raises:
            ConfigError: one is, for another user.
        """
        try:
            return cls.model_validate_json(file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        except OSError as error:
            raise ConfigError(
                f"{file}, which says how the engine of a server is reached, cannot be read ({error.strerror}): "
                "certify as the user that serves, or from another home."
            ) from error
