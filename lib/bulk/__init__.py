"""How a bulk sample is read: tables, pseudo-bulk, reference profiles, mRNA per cell, regression, scTAPE, bulk encoder."""
