"""The dashboard: that Grafana can load it, and that it is laid out well."""

import itertools
import json
import re
from typing import Any

import yaml

from tests.deploy.asked import DASHBOARD, METRIC, ROOT, dashboard
from tests.deploy.cluster import rendered

PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
KINDS = {"row", "stat", "timeseries"}
UNITS = {"none", "short", "s", "reqps", "percentunit"}
WIDTH = 24


def panels() -> list[dict[str, Any]]:
    return list(dashboard()["panels"])


def shown() -> list[dict[str, Any]]:
    return [panel for panel in panels() if panel["type"] != "row"]


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return set(itertools.product(across, down))


def test_panels_neither_overlap_nor_leave_holes_nor_reach_beyond_the_grid() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert not taken & cells(panel), f"{panel['title']} lies on another"
        taken |= cells(panel)
    assert taken == set(itertools.product(range(WIDTH), range(max(y for _, y in taken) + 1)))


def test_every_panel_has_its_own_id_and_says_what_it_shows() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    for panel in panels():
        assert panel["type"] in KINDS
    for panel in shown():
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


def test_every_series_of_a_panel_has_a_name_and_a_letter_of_its_own() -> None:
    for panel in shown():
        targets = panel["targets"]
        assert len({target["refId"] for target in targets}) == len(targets) > 0
        for target in targets:
            assert target["legendFormat"], panel["title"]


def test_everything_asks_the_datasource_that_is_chosen_and_may_be_called_anything() -> None:
    asks = {"type": "prometheus", "uid": "${datasource}"}
    for panel in shown():
        assert panel["datasource"] == asks
        assert all(target["datasource"] == asks for target in panel["targets"])
    chosen, *others = dashboard()["templating"]["list"]
    assert (chosen["name"], chosen["type"], chosen["query"]) == ("datasource", "datasource", asks["type"])
    assert all(each["datasource"] == asks for each in others)
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["type"] == asks["type"]
    assert source["isDefault"], "which is what a variable without a value begins with"


def test_every_panel_shows_one_copy_or_each_by_itself() -> None:
    for target in (target for panel in shown() for target in panel["targets"]):
        query = target["expr"]
        selectors = re.findall(rf"{METRIC.pattern}({{[^}}]*)?", query)
        assert selectors
        assert all(each.startswith('{namespace=~"$namespace"') for each in selectors), query
        assert all("namespace" in each for each in re.findall(r" by \((.*?)\)", query)), query
        assert target["legendFormat"].startswith("{{namespace}} ")


def test_a_sidecar_finds_the_dashboard_in_a_cluster() -> None:
    (made,) = rendered("grafana")
    assert made["kind"] == "ConfigMap"
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert made["metadata"]["name"] == "assay-dashboard", "or there would be two of them after a change"
    assert [json.loads(each) for each in made["data"].values()] == [dashboard()]
    # What `kubectl apply` keeps of an object as an annotation of it.
    assert len(json.dumps(made)) < 256 * 1024


def test_the_provider_reads_the_folder_that_the_dashboard_is_in() -> None:
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "assay.yaml").read_text())["providers"]
    assert provider["options"]["path"].rsplit("/", 1)[1] == DASHBOARD.parent.name
    assert dashboard()["uid"] == "assay"
    assert dashboard()["schemaVersion"] >= 39
