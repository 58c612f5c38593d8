"""How good proportions and cells are: metrics, plots, the report of stage 5."""
