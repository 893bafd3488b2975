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
