"""The job spec: all that a run is, as one frozen model that finds every fault at once.

    spec = load_spec("jobs/image_cnn.yaml", ["workers=2", "optim.lr=3e-4"])
    spec.batch.global_

A fault is a line "field: what was found; what is allowed", and a spec with five faults raises one
`SpecError` with five lines. Nothing here touches the network, Ray or torch.
"""

from dltrain.spec.data import CacheSpec, DataSpec, MixSpec, PackSpec
from dltrain.spec.job import JobSpec, load_spec, parse_spec
from dltrain.spec.running import CheckpointSpec, FaultsSpec, MetricsSpec, WorkersSpec
from dltrain.spec.training import BatchSpec, BestSpec, EngineSpec, GroupSpec, InitSpec, OptimSpec, TrainSpec
from dltrain.spec.watching import MlflowSpec, ProfileSpec, TensorboardSpec, TrackersSpec, WandbSpec

__all__ = [
    "BatchSpec",
    "BestSpec",
    "CacheSpec",
    "CheckpointSpec",
    "DataSpec",
    "EngineSpec",
    "FaultsSpec",
    "GroupSpec",
    "InitSpec",
    "JobSpec",
    "MetricsSpec",
    "MixSpec",
    "MlflowSpec",
    "OptimSpec",
    "PackSpec",
    "ProfileSpec",
    "TensorboardSpec",
    "TrackersSpec",
    "TrainSpec",
    "WandbSpec",
    "WorkersSpec",
    "load_spec",
    "parse_spec",
]
