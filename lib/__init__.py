"""What two or more stages share: the data contract, the models, their likelihoods, metrics and figures."""
