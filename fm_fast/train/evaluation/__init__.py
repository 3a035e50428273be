"""How good a trained network is: samples, distances to data, likelihoods, restored images."""
