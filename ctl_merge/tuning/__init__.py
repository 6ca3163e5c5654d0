"""Make a merge better: coefficients found on data, proven on other data."""
