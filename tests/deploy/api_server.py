"""As much of a Kubernetes API server as kubectl asks about one Job."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.deploy.cluster import NAMESPACE

LOG = "Turbo is quantized from 141.1 GB of BF16 weights, and 64.0 GB are free."
"""The last words of the Job's pod."""
_BATCH = {"groupVersion": "batch/v1", "version": "v1"}
_FOUND: dict[str, dict[str, Any]] = {
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [{"name": "batch", "versions": [_BATCH], "preferredVersion": _BATCH}],
    },
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [{"name": "pods", "namespaced": True, "kind": "Pod", "verbs": ["get", "list"]}],
    },
    "/apis/batch/v1": {
        "kind": "APIResourceList",
        "groupVersion": "batch/v1",
        "resources": [{"name": "jobs", "namespaced": True, "kind": "Job", "verbs": ["get", "list", "watch"]}],
    },
}
"""What it has, which kubectl finds out first."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, job: str, conditions: Sequence[Sequence[str]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._job = job
        self._conditions = list(conditions)

    def answer(self, path: str) -> dict[str, Any] | str | None:
        """What is under a path; each look at the Job is one at its next conditions, until the last."""
        pod = {"name": f"{self._job}-abcde", "namespace": NAMESPACE, "uid": "2", "labels": {"job-name": self._job}}
        if path == f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs/{self._job}":
            now = self._conditions.pop(0) if len(self._conditions) > 1 else self._conditions[0]
            return {
                "kind": "Job",
                "apiVersion": "batch/v1",
                "metadata": {"name": self._job, "namespace": NAMESPACE, "uid": "1"},
                "spec": {"selector": {"matchLabels": pod["labels"]}, "template": {"spec": {"containers": []}}},
                "status": {"conditions": [{"type": each, "status": "True"} for each in now]},
            }
        whole = {"metadata": pod, "spec": {"containers": [{"name": "build"}]}, "status": {"phase": "Failed"}}
        if path == f"/api/v1/namespaces/{NAMESPACE}/pods":
            return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [whole]}
        if path == f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['name']}":
            return {"kind": "Pod", "apiVersion": "v1"} | whole
        if path == f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['name']}/log":
            return f"{LOG}\n"
        return _FOUND.get(path)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        found = self.server.answer(urlsplit(self.path).path)
        self.send_response(404 if found is None else 200)
        self.send_header("content-type", "text/plain" if isinstance(found, str) else "application/json")
        self.end_headers()
        self.wfile.write((found if isinstance(found, str) else json.dumps(found or {})).encode())

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # as it is called there
        """Nothing."""


@contextmanager
def api_server(folder: Path, job: str, *conditions: Sequence[str]) -> Iterator[dict[str, str]]:
    """The environment by which kubectl reaches one; each look at the Job finds the next conditions."""
    server = _Server(job, conditions)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        named = {
            "clusters": [{"name": "a", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "users": [{"name": "a", "user": {}}],
        }
        config = folder / "kubeconfig"
        config.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "a"} | named))
        yield {"KUBECONFIG": str(config), "HOME": str(folder)}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
