"""`python -m ctl_merge` is `ctl-merge`."""

from ctl_merge.cli import main

if __name__ == "__main__":
    main()
