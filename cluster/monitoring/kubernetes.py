"""Monitoring on Kubernetes as plain objects: what to scrape, which rules, which dashboards.

    for each in objects("training"): print(yaml.safe_dump(each))
    python -m cluster.monitoring.kubernetes training > monitoring.yaml      # kubectl apply --server-side -f

Needs the Prometheus operator (kube-prometheus-stack), and for the dashboards either its Grafana with the sidecar, or
the Grafana operator. Pure but for reading the files beside it: no cluster, no SDK.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from dltrain.deploying.manifests import scraped

__all__ = ["PARTS", "objects"]

PARTS = ("scrape", "rules", "sidecar", "operator")

_HERE = Path(__file__).parent
_FOLDER = "dltrain"
# What kube-prometheus-stack selects, where it was installed under its usual name.
_SELECTED = {"release": "prometheus"}
_LABELS = {"app.kubernetes.io/name": "dltrain", "app.kubernetes.io/component": "monitoring"}


def objects(namespace: str, parts: tuple[str, ...] = PARTS) -> list[dict[str, Any]]:
    """Everything that monitoring a run needs in a namespace, ready to be written as YAML; always in the same order.

    Args:
        namespace: where runs are, and where the objects go: the PodMonitor looks at pods of its own namespace only.
        parts: which of them.
            scrape: a PodMonitor of the Ray pods. It finds the driver's metrics by the port name `dltrain-metrics` of
                the head's container, and Ray's by `metrics` (which KubeRay adds by itself), `as-metrics` (44217) and
                `dash-metrics` (44227): those two and the first must be declared as container ports of the head.
            rules: a PrometheusRule with the groups of rules.yml, the file that promtool tests.
            sidecar: a ConfigMap for each dashboard, with the label and folder that Grafana's sidecar looks for. One
                each: all in one are too large, and each is small enough for client-side `kubectl apply`.
            operator: a GrafanaDashboard for each ConfigMap, for the Grafana operator; needs `sidecar` too.

    Each object has `metadata.namespace`, a name that is the same in every namespace, and the label
    `app.kubernetes.io/name: dltrain`.
    """
    made = {
        "scrape": [scraped(_metadata("dltrain", {}), {"ray.io/is-ray-node": "yes"})],
        "rules": [_rules()],
        "sidecar": [_config_map(path) for path in _dashboards()],
        "operator": [_grafana_dashboard(path) for path in _dashboards()],
    }
    found = [each for part in PARTS if part in parts for each in made[part]]
    for each in found:
        each["metadata"]["namespace"] = namespace
    return found


def _dashboards() -> list[Path]:
    return sorted((_HERE / "dashboards").glob("*.json"))


def _metadata(name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "labels": {**_LABELS, **labels}}


def _rules() -> dict[str, Any]:
    groups = yaml.safe_load((_HERE / "rules.yml").read_text())["groups"]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": _metadata("dltrain", _SELECTED),
        "spec": {"groups": groups},
    }


def _config_map(path: Path) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            **_metadata(path.stem, {"grafana_dashboard": "1"}),
            "annotations": {"grafana_folder": _FOLDER},
        },
        "data": {path.name: path.read_text()},
    }


def _grafana_dashboard(path: Path) -> dict[str, Any]:
    return {
        "apiVersion": "grafana.integreatly.org/v1beta1",
        "kind": "GrafanaDashboard",
        "metadata": _metadata(path.stem, {}),
        "spec": {
            "instanceSelector": {"matchLabels": {"dashboards": "grafana"}},
            "allowCrossNamespaceImport": True,
            "folder": _FOLDER,
            "configMapRef": {"name": path.stem, "key": path.name},
        },
    }


def main() -> int:
    """Prints the objects as YAML; returns the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m cluster.monitoring.kubernetes NAMESPACE", file=sys.stderr)
        return 2
    print(yaml.safe_dump_all(objects(sys.argv[1]), sort_keys=False, width=120), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
