"""A real MLflow server, which can be stopped and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

_VARIABLES = {
    # Eight processes for jobs that nobody submits would take half a minute of processor time at each start.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # Its AI gateway may reach what listens on this machine.
    "MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS": "true",
}


class MlflowServer:
    """An MLflow server at `url` that keeps all in `folder`, artifacts in `folder / "artifacts"`, and serves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server; return when it answers."""
        options = {
            "--backend-store-uri": f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination": f"{self.folder}/artifacts",
            "--host": "127.0.0.1",
            "--port": str(self._port),
            "--workers": "1",
        }
        log = self.folder / "log"
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mlflow",
                    "server",
                    *(word for pair in options.items() for word in pair),
                ],
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | _VARIABLES,
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(log.read_text())
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server, if it runs."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=30)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False
