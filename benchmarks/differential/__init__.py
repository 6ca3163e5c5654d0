"""What against_mergekit.py is made of: checkpoints, configurations, both tools, the definition, the verdict."""
