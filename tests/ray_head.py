"""A Ray of its own for a test session: prints its address, and ends when its stdin does."""

from __future__ import annotations

import sys

import ray

if __name__ == "__main__":
    context = ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
