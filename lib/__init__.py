"""The shared code of the six stages: imports flow data <- models <- baselines, bulk <- evaluation <- report; nothing imports a stage.

options    the constants of a stage as its command line        run         folders, files and log of a run
parallel   processes of torchrun, threads                      training    the epoch loop of all models, checkpoints
data/      what goes in: formats, counts, batches, labels      models/     the GMVAE, ours and the paper's
baselines/ generators of other systems                         bulk/       bulk tables, mixtures, deconvolution
evaluation/ metrics and figures                                report/     the page of results
"""
