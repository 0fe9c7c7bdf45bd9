"""How a run gets onto a cluster: as a Ray job (packing -> jobs), or as manifests that KubeRay carries out."""
