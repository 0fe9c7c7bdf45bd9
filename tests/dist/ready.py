"""What the process imports that all ranks are forked from: torch and DeepSpeed, seconds each time if a rank did."""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

from dltrain.running.worker import import_slow_things

import_slow_things()
