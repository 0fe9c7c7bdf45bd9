"""One task and one YAML per kind of network; copy the nearest one."""
