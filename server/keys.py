"""Who may call: API keys, the file that holds their hashes, and the check of a request's key.

Knows what a key allows; counts nothing, and knows nothing of requests but their headers.
"""

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.errors import KeyInvalid, KeyMissing
from tiers.digests import Stamp
from tiers.errors import ConfigError
from tiers.files import write_whole
from tiers.tier import Tier

if TYPE_CHECKING:
    from server.exchange import Headers

log = logging.getLogger("assay.keys")

LOOK_EVERY_S = 1.0
"""How often a running gateway looks whether its file has changed."""

_NAME = r"^[A-Za-z0-9][\w.@-]{0,63}$"
_KEY = re.compile(rb"sk-assay-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_SECRET_BYTES = 32
_HASH_BYTES = 32
_SALT_BYTES = hashlib.blake2b.SALT_SIZE
_Limit = Annotated[int | None, Field(ge=1)]


def _hash(secret: bytes, salt: bytes) -> bytes:
    # A fast hash is enough: nobody guesses 256 random bits, as people do guess passwords.
    return hashlib.blake2b(secret, salt=salt, digest_size=_HASH_BYTES).digest()


class Key(BaseModel):
    """One caller's key as it is kept: what it allows, and a salted hash that only its secret fits."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="hex", val_json_bytes="hex")

    name: str = Field(pattern=_NAME, description="Who holds it.")
    id: str = Field(pattern=r"^[0-9a-f]{12}$", description="The part of the key that finds it; no secret.")
    salt: bytes = Field(min_length=_SALT_BYTES, max_length=_SALT_BYTES, repr=False, description="As hex.")
    hash: bytes = Field(min_length=_HASH_BYTES, max_length=_HASH_BYTES, repr=False, description="As hex.")
    created: AwareDatetime = Field(description="When it was made, UTC.")
    tiers: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Reference, Turbo or Lite, or full names such as Llama-3.1-8B-Instruct-Lite; all if absent.",
    )
    requests_per_minute: _Limit = Field(default=None, description="No limit if absent.")
    tokens_per_minute: _Limit = Field(default=None, description="No limit if absent.")
    concurrent_requests: _Limit = Field(default=None, description="No limit if absent.")

    def may_use(self, tier: Tier) -> bool:
        """Whether its holder may call that tier."""
        return self.tiers is None or tier.kind in self.tiers or tier.name in self.tiers

    @property
    def has_limits(self) -> bool:
        """Whether its holder's requests are counted."""
        return (self.requests_per_minute or self.tokens_per_minute or self.concurrent_requests) is not None

    def fits(self, secret: bytes) -> bool:
        """Whether that is the secret it was made with; takes as long for any other."""
        return hmac.compare_digest(_hash(secret, self.salt), self.hash)


class _Stored(BaseModel):
    """What the file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="hex", val_json_bytes="hex")

    format: Literal[1] = 1
    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _each_is_another(self) -> Self:
        for what in ("name", "id"):
            for value, times in Counter(getattr(key, what) for key in self.keys).items():
                if times > 1:
                    raise ValueError(f"{times} keys have the {what} {value}")
        return self


class KeyFile:
    """The file of keys: read whole, changed by one at a time, and never seen half written."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def read(self) -> tuple[Key, ...]:
        """Every key, oldest first; none if the file is empty or not there.

        Raises:
            ConfigError: it cannot be read, or is not what `assay keys` writes.
        """
        try:
            with self.path.open("rb") as file:
                mode, text = os.fstat(file.fileno()).st_mode & 0o777, file.read()
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise ConfigError(f"The keys in {self.path} cannot be read: {error.strerror}.") from error
        if not text.strip():
            return ()
        try:
            stored = _Stored.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{self.path} is no file of keys: {_first_of(error)}.") from None
        if mode & 0o077:
            log.warning("%s is open to others (mode %03o): run `chmod 600 %s`.", self.path, mode, self.path)
        return stored.keys

    def add(
        self,
        name: str,
        *,
        tiers: Sequence[str] | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        concurrent_requests: int | None = None,
    ) -> str:
        """Make a key and keep its hash; the key itself is only in what is returned.

        Raises:
            ConfigError: somebody has that name, it is no name, or the file cannot be written.
        """
        if not re.fullmatch(_NAME, name):
            raise ConfigError(
                f"{name!r} is no name for a key: a letter or digit, then letters, digits or any of . _ @ -, "
                "64 in all."
            )
        secret, salt = secrets.token_urlsafe(_SECRET_BYTES), secrets.token_bytes(_SALT_BYTES)
        try:
            key = Key(
                name=name,
                id=secrets.token_hex(6),
                salt=salt,
                hash=_hash(secret.encode(), salt),
                created=datetime.now(UTC).replace(microsecond=0),
                tiers=None if tiers is None else tuple(tiers),
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                concurrent_requests=concurrent_requests,
            )
        except ValidationError as error:
            raise ConfigError(f"No key can be made for {name!r}: {_first_of(error)}.") from None
        with self._alone():
            keys = self.read()
            if any(each.name == name for each in keys):
                raise ConfigError(f"There is a key for {name!r} already: choose another name, or remove it first.")
            self._write((*keys, key))
        return f"sk-assay-{key.id}-{secret}"

    def remove(self, name: str) -> None:
        """Forget a key.

        Raises:
            ConfigError: nobody has that name, or the file cannot be written.
        """
        with self._alone():
            keys = self.read()
            kept = tuple(key for key in keys if key.name != name)
            if len(kept) == len(keys):
                known = ", ".join(key.name for key in keys) or "none"
                raise ConfigError(f"There is no key for {name!r} in {self.path}; those there are: {known}.")
            self._write(kept)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock beside the file: of two changes at once the second sees what the first wrote."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path.with_name(f"{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)
        except OSError as error:
            raise ConfigError(f"The keys in {self.path} cannot be changed: {error.strerror}.") from error

    def _write(self, keys: tuple[Key, ...]) -> None:
        text = _Stored(keys=keys).model_dump_json(indent=2) + "\n"
        path = self.path.resolve()  # the file, where `keys` is a link to it
        # Root adds a key for a server that runs as somebody else, who must be able to read it.
        write_whole(path, text.encode(), 0o600, keep_owner=True)


class Keys:
    """What the running gateway asks: is a key needed, and whose is this one? Follows its file.

    Once there has been a file, a key is needed until the end: a file that is lost or emptied shuts callers out
    and never opens the server.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file, if there is one.

        Raises:
            ConfigError: it cannot be read, or is not what `assay keys` writes.
        """
        self._file = KeyFile(path)
        self._clock = clock
        self._by_id: dict[bytes, Key] = {}
        self._complaint = ""
        self._nobody = Key(
            name="nobody",
            id="0" * 12,
            salt=secrets.token_bytes(_SALT_BYTES),
            hash=secrets.token_bytes(_HASH_BYTES),
            created=datetime.now(UTC),
        )
        self._look_at = clock() + LOOK_EVERY_S
        self._required = False
        self._take(self._stamp_now(), self._file.read())

    @property
    def required(self) -> bool:
        """Whether callers need a key: there is a file of keys, or has been one since the start."""
        self._look()
        return self._required

    def authenticate(self, headers: "Headers") -> Key | None:
        """The key that a request came with; None where none is needed.

        Fast enough for the event loop: it reads nothing unless the file has changed.

        Raises:
            KeyMissing: there is none in ``authorization: Bearer``.
            KeyInvalid: it is not in the file.
        """
        self._look()
        if not self._required:
            return None
        given = _bearer(headers)
        if not given:
            raise KeyMissing
        parts = _KEY.fullmatch(given)
        if parts is None:
            raise KeyInvalid
        # Of an unknown id a hash is computed too: how long this takes does not tell which ids there are.
        key = self._by_id.get(parts[1], self._nobody)
        if not key.fits(parts[2]):
            raise KeyInvalid
        return key

    def _look(self) -> None:
        """Take over what the file holds now, if that is due and it has changed."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        try:
            stamp = self._stamp_now()
            if stamp != self._stamp:
                self._take(stamp, self._file.read())
        except ConfigError as error:
            # Tried again at every look: it may have been for want of a file descriptor.
            self._required = True
            if str(error) != self._complaint:
                log.error("%s The keys known before stay as they are.", error)  # noqa: TRY400
            self._complaint = str(error)
        else:
            self._complaint = ""

    def _stamp_now(self) -> Stamp | None:
        try:
            return Stamp.of(self._file.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ConfigError(f"The keys in {self._file.path} cannot be read: {error.strerror}.") from error

    def _take(self, stamp: Stamp | None, keys: tuple[Key, ...]) -> None:
        self._stamp, self._required = stamp, self._required or stamp is not None
        self._by_id = {key.id.encode(): key for key in keys}
        if self._required and not keys:
            state = "is gone" if stamp is None else "holds no key"
            log.warning("%s %s: nobody may call until there is a key in it.", self._file.path, state)


def _bearer(headers: "Headers") -> bytes:
    """What follows ``authorization: Bearer``, as ASGI has the headers: names in lower case."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return given.strip()
    return b""


def _first_of(error: ValidationError) -> str:
    """Where the first mistake is and what, without the value, which may be a hash."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
