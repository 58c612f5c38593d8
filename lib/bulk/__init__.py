"""How a bulk sample is read: tables, pseudo-bulk, reference profiles, regression, scTAPE, bulk encoder."""
