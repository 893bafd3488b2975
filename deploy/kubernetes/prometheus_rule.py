"""Writes the rules of deploy/prometheus as PrometheusRules of its operator: one source, in two wrappings.

python deploy/kubernetes/prometheus_rule.py
"""

from pathlib import Path

import yaml

HERE = Path(__file__).parent
SOURCES = HERE.parent / "prometheus"
TARGETS = HERE / "prometheus-operator"
FILES = {"rules.yml": ("rules.yaml", "assay"), "kubernetes.yml": ("pods.yaml", "assay-pods")}
"""By source: what it is written to, and what the PrometheusRule is called."""


def wrapped(source: str, rules: str) -> str:
    """The text of the PrometheusRule for the text of a source."""
    _, name = FILES[source]
    whole = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "assay"}},
        "spec": {"groups": yaml.safe_load(rules)["groups"]},
    }
    head = f"# Made from deploy/prometheus/{source} by deploy/kubernetes/prometheus_rule.py.\n"
    return head + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=1000)


if __name__ == "__main__":
    for source, (target, _) in FILES.items():
        (TARGETS / target).write_text(wrapped(source, (SOURCES / source).read_text()))
