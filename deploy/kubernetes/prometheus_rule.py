"""Writes deploy/prometheus/rules.yml as the PrometheusRule of its operator: one source, in two wrappings.

python deploy/kubernetes/prometheus_rule.py
"""

from pathlib import Path

import yaml

HERE = Path(__file__).parent
SOURCE = HERE.parent / "prometheus" / "rules.yml"
TARGET = HERE / "prometheus-operator" / "rules.yaml"
HEAD = "# Made from deploy/prometheus/rules.yml by deploy/kubernetes/prometheus_rule.py.\n"


def wrapped(rules: str) -> str:
    """The text of rules.yaml for the text of rules.yml."""
    labels = {"app.kubernetes.io/name": "assay"}
    whole = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "assay", "labels": labels},
        "spec": {"groups": yaml.safe_load(rules)["groups"]},
    }
    return HEAD + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=1000)


if __name__ == "__main__":
    TARGET.write_text(wrapped(SOURCE.read_text()))
