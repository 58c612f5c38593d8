"""One page of the results of stage 5 for a reader who runs no code: fig/report.html."""
