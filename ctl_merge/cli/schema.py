"""`ctl-merge schema`: the JSON schema of recipes."""

from __future__ import annotations

from ctl_merge.cli.terminal import print_json


def schema() -> None:
    """Print the JSON schema of recipes, for editors that complete and check YAML."""
    from ctl_merge.json_schema import recipe_schema

    print_json(recipe_schema())
