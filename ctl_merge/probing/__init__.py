"""The feature probe: Cross-Task Linearity, block by block."""
