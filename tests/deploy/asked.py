"""What dashboards, rules and autoscalers ask of Prometheus, and whether a scrape has it."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
"""Everybody's."""
POD_RULES = DEPLOY / "prometheus" / "kubernetes.yml"
"""Of clusters, by kube-state-metrics."""
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "assay.json"
BY_PROMETHEUS = frozenset({"job", "instance", "namespace"})
"""Labels that every series gets when it is scraped, the last of them by Prometheus' operator."""
_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$tier": ".*", "$namespace": ".*"}
"""Grafana's, and what stands for them here: what it fills in for all."""


@dataclass(frozen=True)
class Asked:
    """One series that is asked for, and the labels by which it is."""

    name: str
    labels: frozenset[str]


def asked_in(query: str) -> set[Asked]:
    """Everything that a PromQL expression asks for; labels that it groups or joins by are asked of all below."""
    return set(_asked(promql_parser.parse(query), frozenset()))


def _asked(node: Any, above: frozenset[str]) -> Iterator[Asked]:
    match node:
        case promql_parser.VectorSelector():
            yield Asked(str(node.name), above | {each.name for each in node.matchers.matchers})
        case promql_parser.MatrixSelector():
            yield from _asked(node.vector_selector, above)
        case promql_parser.Call() if node.func.name == "label_replace":
            made, source = node.args[1].val, node.args[3].val  # label_replace(of, made, "$1", source, …)
            yield from _asked(node.args[0], above - {made} | {source})
        case promql_parser.Call():
            for argument in node.args:
                yield from _asked(argument, above)
        case promql_parser.AggregateExpr():
            yield from _asked(node.expr, frozenset(node.modifier.labels if node.modifier else ()))
        case promql_parser.BinaryExpr():
            matching = node.modifier.matching if node.modifier else None
            joined = above | frozenset(matching.labels if matching else ())
            yield from _asked(node.lhs, joined)
            yield from _asked(node.rhs, joined)
        case promql_parser.SubqueryExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
            yield from _asked(node.expr, above)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            raise TypeError(f"{type(node).__name__} is not known here")


@cache
def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text()))


def panel_queries() -> dict[str, str]:
    """What each panel asks, Grafana's variables filled in."""
    return {where: _filled_in(target["expr"]) for where, target in _targets()}


def legends() -> dict[str, set[str]]:
    """The labels that each panel calls its series by."""
    return {where: set(re.findall(r"{{(\w+)}}", target["legendFormat"])) for where, target in _targets()}


def _targets() -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target


def _filled_in(query: str) -> str:
    for variable, value in _VARIABLES.items():
        query = query.replace(variable, value)
    return query


@cache
def rules() -> list[dict[str, Any]]:
    groups = [
        group for file in (RULES, POD_RULES) for group in yaml.load(file.read_text(), yaml.CSafeLoader)["groups"]
    ]
    return [rule for group in groups for rule in group["rules"]]


def rule_queries() -> dict[str, str]:
    return {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}


@cache
def recorded() -> frozenset[str]:
    """What the rules themselves make."""
    return frozenset(rule["record"] for rule in rules() if "record" in rule)


@cache
def autoscaler_queries() -> dict[str, str]:
    """What KEDA asks Prometheus in the manifests of Kubernetes."""
    found: dict[str, str] = {}
    for file in sorted((DEPLOY / "kubernetes").rglob("*.y*ml")):
        for document in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            found |= {f"{file.relative_to(ROOT)} {number}": each for number, each in enumerate(_queries(document))}
    return found


def _queries(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "serverAddress" in node and "query" in node:
            yield node["query"]
        node = list(node.values())
    for each in node if isinstance(node, list) else ():
        yield from _queries(each)


def every_query() -> dict[str, str]:
    return panel_queries() | rule_queries() | autoscaler_queries()


class Scrape:
    """What was scraped: its series, and the labels that each has."""

    def __init__(self, *expositions: str) -> None:
        self.labels: dict[str, frozenset[str]] = {}
        for text in expositions:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    known = self.labels.get(sample.name, frozenset())
                    self.labels[sample.name] = known | frozenset(sample.labels)

    def missing(self, asked: Iterable[Asked]) -> list[str]:
        """Of these, the series that there are not, and the labels that they have not."""
        problems = []
        for each in sorted(asked, key=lambda one: one.name):
            if each.name == "up" or each.name in recorded():
                continue
            if each.name not in self.labels:
                problems.append(f"there is no {each.name}")
            elif absent := each.labels - self.labels[each.name] - BY_PROMETHEUS:
                problems.append(f"{each.name} has no label {', '.join(sorted(absent))}")
        return problems


def asked_by_all(prefixes: tuple[str, ...]) -> set[Asked]:
    """What anything in deploy/ asks of series whose names begin so."""
    every = {each for query in every_query().values() for each in asked_in(query)}
    return {each for each in every if each.name.startswith(prefixes)}


OURS = ("assay_", "gen_ai_")
ENGINES = ("vllm:",)
METRIC = re.compile(r"\b(?:assay_|gen_ai_(?:server|client)_|vllm:|assay:)[a-z0-9_:]+")
"""Whatever looks like a metric's name in a text."""
