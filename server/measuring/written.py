"""The certificates of tiers that were measured, each where the gateway finds it as soon as it is there."""

from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.certificates import Certificates
from server.config import Config
from tiers.conformance.report import Measured, render_report
from tiers.conformance.signature import sign
from tiers.errors import CertificateError
from tiers.files import write_whole
from tiers.tier import Tier


class Written:
    """What one `assay certify` has written so far, and the report of it."""

    def __init__(self, config: Config, tiers: Sequence[Tier], key: Ed25519PrivateKey | None = None) -> None:
        """
        Args:
            config: says where.
            tiers: whose certificates may come, in the order of the report.
            key: to put a signed envelope beside each certificate; without one an earlier envelope is removed.
        """
        self.report: Path = config.certificates / "report.html"
        self._kept = Certificates(config.certificates)
        self._tiers = {tier.name: tier for tier in tiers}
        self._key = key
        self._measured: dict[str, Measured] = {}

    def add(self, measured: Measured) -> None:
        """Put a tier's certificate in place of its last one, and into the report.

        Raises:
            CertificateError: it, its envelope or the report cannot be written.
        """
        name = measured.certificate.predicate.tier
        file = self._kept.save(self._tiers[name], measured.certificate)
        self._measured[name] = measured
        found = [self._measured[name] for name in self._tiers if name in self._measured]
        envelope = file.with_suffix(".dsse.json")
        try:
            envelope.unlink(missing_ok=True)  # it says of another certificate that it is signed
            if self._key is not None:
                sign(measured.certificate, self._key).write(envelope)
            write_whole(self.report, render_report(found).encode())
        except OSError as error:
            raise CertificateError(f"{envelope} or {self.report} cannot be written ({error.strerror}).") from error
