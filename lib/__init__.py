"""The shared code of the six stages, one folder per question.

options, ranges, files, parallel    how a stage runs: constants, files, processes and threads
training, checkpoints               epochs of any model; its state on disk
runs, records  what a run holds and how it ends; checksum and maker of every file
data/          what goes in: download, file formats, labels, the count files, mini-batches, embeddings
models/        the GMVAE (fig. 1 of the paper), its likelihoods, and how cells are sampled from it
baselines/     generators of other systems that can take the GMVAE's place
bulk/          how a bulk sample is read: tables, pseudo-bulk, regression, scTAPE, bulk encoder
evaluation/    how good the cells and proportions are: metrics, plots, the report of stage 5

Imports flow one way: data <- models <- baselines, bulk <- evaluation. Nothing imports a stage script.
"""
