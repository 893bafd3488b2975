"""Whether a server answers 200: the exit code that a container's health check asks for.

usage: python healthcheck.py URL [KEY_FILE]

KEY_FILE holds the key of an engine, which answers nobody else.
"""

import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 5.0


def main(url: str, key_file: str | None = None) -> int:
    """0 for an answer of 200 in time, else 1 and the reason."""
    headers = {"authorization": f"Bearer {Path(key_file).read_text().strip()}"} if key_file else {}
    try:
        # No proxy: it is asked of the container itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S):  # noqa: S310
            return 0
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
