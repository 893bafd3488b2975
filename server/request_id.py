"""The name a request goes by in answers, in logs and at its engine."""

import itertools
import re
import secrets

from server.exchange import Headers

_UNSAFE = re.compile(r"[^\w.:@-]", re.ASCII)
_LONGEST = 128
_OURS = f"req-{secrets.token_hex(6)}"
_numbers = itertools.count()


def request_id_of(headers: Headers) -> str:
    """The caller's own ``x-request-id``, with only harmless characters and bounded, or a new one.

    A new one too where a key was put there by mistake: ids are logged, and keys are not.
    """
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    cleaned = _UNSAFE.sub("", given.decode("ascii", errors="ignore"))[:_LONGEST] if given else ""
    return cleaned if cleaned and "sk-" not in cleaned else f"{_OURS}{next(_numbers):010x}"
