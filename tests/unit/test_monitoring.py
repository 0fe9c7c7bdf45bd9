"""Dashboards, rules, runbook and Kubernetes objects agree with the catalogue and with each other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import ROOT

from cluster.monitoring import dashboards
from cluster.monitoring.kubernetes import PARTS, objects
from dltrain.observing.catalogue import TABLE

MONITORING = ROOT / "cluster" / "monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yml").read_text())
CASES = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
FILES = sorted((MONITORING / "dashboards").glob("*.json"))
# Series of others, as their sources have them: dcgm-exporter's etc/*.csv, KubeRay's controllers/ray/metrics, and Ray's.
FOREIGN = {
    "ALERTS",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_GPU_TEMP",
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL",
    "DCGM_FI_DEV_POWER_USAGE",
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS",
    "DCGM_FI_DEV_XID_ERRORS",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
    "DCGM_FI_PROF_SM_ACTIVE",
    "kuberay_cluster_condition_provisioned",
    "kuberay_cluster_provisioned_duration_seconds",
    "kuberay_job_deployment_status",
    "kuberay_job_execution_duration_seconds",
    "kuberay_job_info",
    "ray_memory_manager_worker_eviction_total",
    "ray_node_cpu_count",
    "ray_node_cpu_utilization",
    "ray_node_disk_utilization_percentage",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "ray_object_store_memory",
    "ray_placement_groups",
    "ray_resources",
}
# Grafana's own, and those of custom units.
UNITS = [
    "bool_yes_no",
    "Bps",
    "bytes",
    "celsius",
    "cps",
    "flops",
    "mbytes",
    "MBs",
    "ops",
    "percent",
    "percentunit",
    "reqps",
    "rowsps",
    "s",
    "sci",
    "short",
    "watt",
]
BUILT_IN = {"__all", "__range", "__rate_interval", "__url_time_range"}
KIB = 1024

# What is no metric's name in an expression: texts, selectors, windows, labels of a clause, functions, words.
_NOT_NAMES = (
    r'"[^"]*"',
    r"\{[^}]*\}",
    r"\[[^\]]*\]",
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
    r"\b\w+\s*(?=\()",
    r"(?<![\w:])(?:sum|max|min|avg|count|quantile|topk|bottomk|and|or|unless|offset|bool)\b",
    r"\b[0-9][\w.]*",
)


def names(expr: str) -> set[str]:
    """The series that a PromQL expression asks for."""
    for pattern in _NOT_NAMES:
        expr = re.sub(pattern, " ", expr)
    return set(re.findall(r"[A-Za-z_:][\w:]*", expr))


def known() -> dict[str, str]:
    """Every series of the catalogue -> its metric."""
    found = {m.full_name: m.full_name for m in TABLE if m.kind != "histogram"}
    for metric in (m for m in TABLE if m.kind == "histogram"):
        found |= {f"{metric.full_name}_{suffix}": metric.full_name for suffix in ("bucket", "sum", "count")}
    return found


def rules(kind: str) -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"] if kind in rule]


def board(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def panels(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in found["panels"] if panel["type"] != "row"]


def expressions(found: dict[str, Any]) -> Iterator[str]:
    for panel in panels(found):
        yield from (target["expr"] for target in panel["targets"])
    for mark in found["annotations"]["list"]:
        yield mark["expr"]
    for variable in found["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"label_values\((.*), \w+\)", r"\1", variable["query"])


def all_expressions() -> list[str]:
    drawn = [expr for path in FILES for expr in expressions(board(path))]
    return [*drawn, *(rule["expr"] for rule in rules("expr"))]


def test_names_are_found_in_expressions() -> None:
    expr = 'sum by (run, le) (rate(a_bucket{run=~"$run", x="no"}[5m])) / on (run) group_left () (b:c:max offset 2h > 0)'
    assert names(expr) == {"a_bucket", "b:c:max"}
    assert names('topk(5, x) and on (a) topk(2, max_over_time(y{z="1"}[$__range] @ end())) or vector(0)') == {"x", "y"}


# ---- rules ----


def test_every_series_that_is_asked_for_is_exported_by_somebody() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    asked = set().union(*map(names, all_expressions()))
    assert asked - recorded - set(known()) == FOREIGN


def test_every_metric_of_the_catalogue_is_shown_or_judged() -> None:
    used = set().union(*map(names, all_expressions()))
    assert {metric for series, metric in known().items() if series in used} == {m.full_name for m in TABLE}


def test_recorded_series_are_used_and_named_by_what_they_are_grouped_by() -> None:
    used = set().union(*map(names, all_expressions()))
    for rule in rules("record"):
        levels, metric, operation = rule["record"].split(":")
        assert rule["record"] in used, rule["record"]
        assert metric.startswith("dltrain_")
        assert operation
        assert set(levels.split("_")) <= {"run", "rank", "state"}


def cases(alert: str) -> Iterator[dict[str, Any]]:
    for test in CASES:
        yield from (case for case in test.get("alert_rule_test", ()) if case["alertname"] == alert)


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_alerts_are_explained_and_tested_both_ways(rule: dict[str, Any]) -> None:
    name, annotations = rule["alert"], rule["annotations"]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert annotations["summary"]
    page, _, anchor = annotations["runbook_url"].partition("#")
    sections = re.findall(r"^## (\w+)$\n\n\*(\w+)\*", (ROOT / page).read_text(), re.MULTILINE)
    assert (name, rule["labels"]["severity"]) in sections
    assert anchor == name.lower()
    assert {bool(case["exp_alerts"]) for case in cases(name)} == {True, False}


def test_the_runbook_has_no_section_of_an_alert_that_is_gone() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == {rule["alert"] for rule in rules("alert")}
    links = re.findall(r"\]\(#(\w+)\)", text)
    assert links
    assert set(links) <= {rule["alert"].lower() for rule in rules("alert")}


def test_docs_name_series_and_files_that_exist() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("monitoring.md", "runbook.md"))
    recorded = {rule["record"] for rule in rules("record")}
    assert set(re.findall(r"\bdltrain_[a-z_]+\b", re.sub(r"run\w*:[\w:]+", "", text))) <= set(known())
    assert set(re.findall(r"run\w*:[\w:]+", text)) <= recorded
    for path in re.findall(r"(?:cluster|tests|docs)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists(), path


# ---- dashboards ----


def test_dashboards_are_what_the_code_makes() -> None:
    made = dashboards.make()
    assert {path.name for path in FILES} == set(made)
    for path in FILES:
        assert path.read_text() == made[path.name], f"{path.name}: python -m cluster.monitoring.dashboards"


def test_a_file_that_was_edited_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dashboards, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["dashboards"])
    assert dashboards.main() == 0
    monkeypatch.setattr("sys.argv", ["dashboards", "--check"])
    assert dashboards.main() == 0
    (tmp_path / "dltrain-time.json").write_text("{}")
    assert dashboards.main() == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestDashboard:
    def test_it_can_be_told_from_others(self, path: Path) -> None:
        found = board(path)
        assert found["uid"] == path.stem
        assert found["title"].startswith("dltrain / ")
        assert found["description"]
        assert found["tags"] == ["dltrain"]

    def test_panels_lie_side_by_side(self, path: Path) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in board(path)["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not taken & cells, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells
        ids = [panel["id"] for panel in board(path)["panels"]]
        assert len(set(ids)) == len(ids)

    def test_panels_say_what_they_show_and_in_which_unit(self, path: Path) -> None:
        titles = [panel["title"] for panel in panels(board(path))]
        assert len(set(titles)) == len(titles)
        for panel in panels(board(path)):
            assert len(panel["description"]) > 10, panel["title"]
            unit = panel["fieldConfig"]["defaults"]["unit"]
            assert unit in UNITS or unit.startswith("suffix:"), (panel["title"], unit)
            assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None

    def test_queries_go_to_the_chosen_source_and_have_legends(self, path: Path) -> None:
        found = board(path)
        assert [v["name"] for v in found["templating"]["list"] if v["type"] == "datasource"] == ["datasource"]
        asking = [*panels(found), *(t for p in panels(found) for t in p["targets"]), *found["annotations"]["list"]]
        asking += [v for v in found["templating"]["list"] if v["type"] == "query"]
        for each in asking:
            assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for panel in panels(found):
            refs = [target["refId"] for target in panel["targets"]]
            assert refs
            assert len(set(refs)) == len(refs)
            assert all(target["legendFormat"] for target in panel["targets"])

    def test_variables_are_defined_and_used(self, path: Path) -> None:
        text = path.read_text()
        defined = {v["name"] for v in board(path)["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", text))
        assert used - BUILT_IN == defined

    def test_links_lead_somewhere(self, path: Path) -> None:
        uids = {board(each)["uid"] for each in FILES} | set(dashboards.RAY_UIDS)
        found = set(re.findall(r'"/d/(\w[\w-]*)', path.read_text()))
        assert found >= set(dashboards.RAY_UIDS)
        assert found <= uids
        assert any(link.get("tags") == ["dltrain"] for link in board(path)["links"])


def test_there_are_all_eight() -> None:
    assert len(FILES) == 8
    variables = {v["name"] for path in FILES for v in board(path)["templating"]["list"]}
    assert {"datasource", "run", "rank"} <= variables


# ---- Kubernetes ----


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [each for each in objects("training") if each["kind"] == kind]


def test_objects_are_in_the_namespace_and_told_apart() -> None:
    found = objects("training")
    assert {each["metadata"]["namespace"] for each in found} == {"training"}
    names = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert len(set(names)) == len(names)
    assert found == objects("training")
    assert [each["kind"] for each in objects("training", parts=("rules",))] == ["PrometheusRule"]
    assert sum(len(objects("a", parts=(part,))) for part in PARTS) == len(found)


def test_the_driver_and_ray_are_scraped() -> None:
    (monitor,) = of_kind("PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    spec = monitor["spec"]
    ports = {each["port"]: each for each in spec["podMetricsEndpoints"]}
    assert list(ports) == ["dltrain-metrics", "metrics", "as-metrics", "dash-metrics"]
    assert spec["podTargetLabels"] == ["ray.io/cluster"]
    assert spec["sampleLimit"] > 12_000
    dropped = ports["metrics"]["metricRelabelings"][0]["regex"]
    assert re.fullmatch(dropped, "ray_grpc_server_req_new_total")
    assert not any(re.fullmatch(dropped, name) for name in FOREIGN)


def test_the_rules_are_those_that_promtool_tests() -> None:
    (rule,) = of_kind("PrometheusRule")
    assert rule["spec"]["groups"] == RULES["groups"]


def test_each_dashboard_is_a_config_map_that_kubectl_can_apply() -> None:
    maps = {each["metadata"]["name"]: each for each in of_kind("ConfigMap")}
    assert sorted(maps) == [path.stem for path in FILES]
    for path in FILES:
        each = maps[path.stem]
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert each["metadata"]["annotations"]["grafana_folder"]
        assert each["data"] == {path.name: path.read_text()}
        assert len(yaml.safe_dump(each)) < 256 * KIB
        assert path.stat().st_size < 256 * KIB


def test_the_operators_dashboards_take_them_from_there() -> None:
    maps = {each["metadata"]["name"]: each for each in of_kind("ConfigMap")}
    found = of_kind("GrafanaDashboard")
    assert len(found) == len(maps)
    for each in found:
        reference = each["spec"]["configMapRef"]
        assert reference["key"] in maps[reference["name"]]["data"]


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        ("PodMonitor", "monitoring.coreos.com_podmonitor_v1"),
        ("PrometheusRule", "monitoring.coreos.com_prometheusrule_v1"),
        ("GrafanaDashboard", "grafana.integreatly.org_grafanadashboard_v1beta1"),
    ],
)
def test_objects_pass_the_schemas_of_their_kinds(kind: str, schema: str) -> None:
    folder = os.environ.get("DLTRAIN_CRD_SCHEMAS")
    if not folder:
        pytest.skip("DLTRAIN_CRD_SCHEMAS names no folder of strict schemas made from the CRDs")
    import jsonschema

    # Their patterns are Go's: the schema itself is not checked.
    validator = jsonschema.Draft202012Validator(json.loads((Path(folder) / f"{schema}.json").read_text()))
    for each in of_kind(kind):
        assert not [error.message for error in validator.iter_errors(each)]
        each["spec"]["typo"] = 1
        assert list(validator.iter_errors(each))


# ---- the laptop ----


def test_what_provisions_grafana_finds_the_dashboards() -> None:
    provider = yaml.safe_load((MONITORING / "grafana" / "dashboards" / "dltrain.yml").read_text())["providers"][0]
    path = provider["options"]["path"].replace("$DLTRAIN_MONITORING", str(MONITORING))
    assert Path(path) == FILES[0].parent
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasources" / "dltrain.yml").read_text())["datasources"]
    scraping = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
    assert (MONITORING / scraping["rule_files"][0]).exists()
    targets = {job["job_name"]: job for job in scraping["scrape_configs"]}
    assert "127.0.0.1:9464" in targets["dltrain"]["static_configs"][0]["targets"]
