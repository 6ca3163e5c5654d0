"""Make a merge better: coefficients found on data, then proven."""
