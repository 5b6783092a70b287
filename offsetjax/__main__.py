"""`python -m offsetjax`: the same as the command `offsetjax`."""

from offsetjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
