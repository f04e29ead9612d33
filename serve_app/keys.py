"""Makes a key for the API: `python -m serve_app.keys NAME`."""

from __future__ import annotations

import argparse
import secrets
import sys

from serve_app.api.access import digest


def main() -> None:
    """Print a new key on stderr, and on stdout the line with its hash for the file that `api_keys` names."""
    parser = argparse.ArgumentParser(prog="python -m serve_app.keys", description=__doc__)
    parser.add_argument("name", help="whom the key is for: letters, digits, - and _")
    name = parser.parse_args().name
    if not name or name.startswith("#") or len(name.split()) != 1:
        parser.error(f"name is {name!r}; it must be one word that does not begin with #")
    key = f"sk-{secrets.token_urlsafe(32)}"
    print(f"The key of {name}, which is shown once: {key}", file=sys.stderr)
    print(f"{name} {digest(key)}")


if __name__ == "__main__":
    main()
