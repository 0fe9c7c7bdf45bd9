"""A search with Ray Tune: python tune_digits.py"""

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from dltrain.integrations.tune import trainable

if __name__ == "__main__":
    tuner = tune.Tuner(
        trainable("digits.yaml", metric="accuracy", mode="max"),
        # Fields of the spec; each trial is a run of its own.
        param_space={"optim.lr": tune.grid_search([1e-5, 1e-2, 3e-3]), "batch.global": 64, "workers": 1},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            # By its own steps: a trial that is started again goes on where it was.
            scheduler=ASHAScheduler(time_attr="step", grace_period=50, max_t=200, reduction_factor=2),
        ),
    )
    best = tuner.fit().get_best_result()
    print(f"best: lr {best.config['optim.lr']}, accuracy {best.metrics['accuracy']:.4f}, in {best.metrics['run']}")
