"""dltrain inside what Ray offers: trials of Ray Tune, and train functions of Ray Train.

dltrain.integrations.tune.trainable("digits.yaml")        # for ray.tune.Tuner
dltrain.integrations.train.run_in_train_fn("digits.yaml")  # in the train function of a TorchTrainer
"""
