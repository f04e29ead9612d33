"""The environment variables that Ray must start with for the endpoint to be fast and to lose nothing.

Serve reads them when its processes start, so that an application cannot set them: they belong where `ray start` runs.
`serve.env`, beside this file, has them, with the reasons.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import psutil

FILE = Path(__file__).with_name("serve.env")


def variables() -> dict[str, str]:
    """Return what `serve.env` sets."""
    words = shlex.split(FILE.read_text(encoding="utf-8"), comments=True)
    return dict(word.split("=", 1) for word in words if "=" in word)


def advice(environ: Mapping[str, str]) -> str | None:
    """Return one line that says what is missing in `environ`, and what to do; None if nothing is.

    A variable with another value is the user's choice.
    """
    missing = [name for name in variables() if name not in environ]
    if not missing:
        return None
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return (
        f"Ray was started without {names}; the endpoint works, but is slower and keeps less of its promises; "
        f"run `. {FILE}` before `ray start`, on every node"
    )


def haproxy_apart(directory: Path, stats_port: int, metrics_port: int) -> dict[str, str]:
    """Return what keeps one cluster's HAProxy apart from that of another cluster on the same machine.

    `directory` is for its files. The path has at most 28 characters: HAProxy adds 79, and that of a socket has 107.
    """
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
    }


def haproxy_processes(directory: Path) -> set[psutil.Process]:
    """Return the processes of the HAProxy whose files are in `directory`; a Ray that is killed leaves them running."""
    return {
        process
        for process in psutil.process_iter(["cmdline"])
        if any(part.startswith(f"{directory}/") for part in process.info["cmdline"] or [])
    }
