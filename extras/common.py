"""What several commands in extras/ share."""

import json
import os
import sys


def read_jsonl(path):
    """The rows of a .jsonl file, as a list."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def run_command(main, name):
    """Run main() as the command `name` and exit with its status, or with 130 after Ctrl-C."""
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stdout or nowhere  # None if it is closed
        sys.stderr = sys.stderr or nowhere
        # A path that the console cannot print ends no run.
        sys.stdout.reconfigure(errors="backslashreplace")
        try:
            status = main()
        except KeyboardInterrupt:
            print(f"{name}: stopped", file=sys.stderr)
            status = 130
        sys.exit(status)
