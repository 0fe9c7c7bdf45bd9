"""dltrain: distributed deep-learning training on Ray and DeepSpeed.

    dltrain run spec.yaml            # train
    from dltrain import Task         # write your own

The command line is `dltrain.cli`; everything a task needs is importable from here.
"""

__version__ = "0.1.0"
