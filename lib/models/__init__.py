"""The GMVAE (fig. 1 of the paper): networks, start of the training, sampling of new cells, likelihoods and profiles."""
