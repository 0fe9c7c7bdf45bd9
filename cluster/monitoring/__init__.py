"""What watches a run: Prometheus' configuration and rules, Grafana's dashboards, and both for Kubernetes.

python -m cluster.monitoring.dashboards                 # writes dashboards/*.json anew
python -m cluster.monitoring.kubernetes NAMESPACE       # the objects that Kubernetes needs, as YAML
"""
