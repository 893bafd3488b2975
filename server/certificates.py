"""The certificates of a server's tiers, a file each. Knows files; what they say now is `server.standing`'s."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from tiers.conformance.certificate import Certificate
from tiers.digests import Stamp
from tiers.errors import CertificateError
from tiers.tier import Tier

log = logging.getLogger("assay.certificates")

LOOK_EVERY_S = 1.0
"""How often a file is looked at, at most."""


class Certificates:
    """The folder of certificates."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self._clock = clock
        self._followed: dict[Path, Followed] = {}

    def file(self, tier: Tier) -> Path:
        """Where that tier's certificate lies, or would."""
        return self.folder / f"{tier.slug}.json"

    def save(self, tier: Tier, certificate: Certificate) -> Path:
        """Put it in place of the tier's last one, whole: a server that runs never sees a part of it.

        Raises:
            CertificateError: it cannot be written.
        """
        path = self.file(tier)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            certificate.write(path)
        except OSError as error:
            raise CertificateError(f"{path} cannot be written ({error.strerror}).") from error
        return path

    def of(self, tier: Tier) -> Certificate | None:
        """The tier's certificate, whatever it says and of what; None where there is none that can be read."""
        return self.follow(tier).certificate

    def follow(self, tier: Tier) -> "Followed":
        """The tier's file, for who asks at every request what it holds."""
        path = self.file(tier)
        if path not in self._followed:
            self._followed[path] = Followed(path, self._clock)
        return self._followed[path]


class Followed:
    """One file, looked at once a second, and read when it has changed."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._look_at = float("-inf")
        self._stamp: Stamp | None = None
        self._held: Certificate | None = None
        self._complaint = ""

    @property
    def certificate(self) -> Certificate | None:
        """What it holds. Fast enough for the event loop, and no error of the file's is one of this."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._look()
        return self._held

    def _look(self) -> None:
        """Take over what the file holds now, if it has changed."""
        try:
            stamp = self._stamp_now()
            if stamp == self._stamp:
                return
            self._held = None
            text = self._path.read_bytes() if stamp else b""
        except OSError as error:
            # Looked at again the next time: it may have been for want of a file descriptor.
            self._held, self._stamp = None, None
            self._complain(f"It cannot be read ({error.strerror}).")
            return
        self._stamp = stamp
        if stamp is None:
            return
        try:
            self._held = Certificate.parse(text)
        except CertificateError as error:
            self._complain(str(error))
        else:
            self._complaint = ""

    def _stamp_now(self) -> Stamp | None:
        try:
            return Stamp.of(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _complain(self, problem: str) -> None:
        if problem != self._complaint:
            log.error("%s: %s The tier counts as one without a certificate.", self._path, problem)
        self._complaint = problem
