"""The feature probe: Cross-Task Linearity of a merge, block by block."""
