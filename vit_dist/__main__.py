"""The command `vit-dist`, and `python -m vit_dist`: answers signals before anything else is imported."""

import sys

from vit_dist.job import signals


def main() -> int:
    """Runs a verb; returns the exit code."""
    signals.answer()
    from vit_dist import cli  # a signal meanwhile ends the process

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
