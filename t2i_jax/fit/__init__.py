"""From a data set as it is to a model: what to train on it, with which configs, and for how many steps."""
