"""Generators of other systems that can take the GMVAE's place: beta-VAE, PCA-CVAE and DeepConvCVAE."""
