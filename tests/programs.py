"""Programs that tests ask and pip does not bring."""

import os
import shutil

import pytest

PACKAGES = {
    "buildah": "buildah",
    "kubectl": "kubernetes-client",
    "promtool": "prometheus",
    "redis-server": "redis-server",
    "setpriv": "util-linux",
    "systemd-analyze": "systemd",
    "tini": "tini",
    "unshare": "util-linux",
}
"""Debian's, by program."""


def program(name: str) -> str:
    """Where it is; the test is passed over without it, or fails where ASSAY_PROGRAMS=required, as CI has it."""
    if found := shutil.which(name):
        return found
    missing = f"there is no {name}: apt-get install {PACKAGES[name]}"
    if os.environ.get("ASSAY_PROGRAMS") == "required":
        pytest.fail(missing)
    pytest.skip(missing)
