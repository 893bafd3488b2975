"""The dashboard: that Grafana can load it, and that it is laid out well."""

import itertools
from typing import Any

import yaml

from tests.deploy.asked import DASHBOARD, ROOT, dashboard

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


def test_everything_asks_the_datasource_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    asks = {"type": source["type"], "uid": source["uid"]}
    for panel in shown():
        assert panel["datasource"] == asks
        assert all(target["datasource"] == asks for target in panel["targets"])
    assert all(each["datasource"] == asks for each in dashboard()["templating"]["list"])


def test_the_provider_reads_the_folder_that_the_dashboard_is_in() -> None:
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "assay.yaml").read_text())["providers"]
    assert provider["options"]["path"].rsplit("/", 1)[1] == DASHBOARD.parent.name
    assert dashboard()["uid"] == "assay"
    assert dashboard()["schemaVersion"] >= 39
