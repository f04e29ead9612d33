"""How many replicas the standby of a model has, which the follower of the registry says.

Ray Serve's controller gets this module by value, and has nothing else of the application: it must import no other one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from ray.experimental import internal_kv
from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingContext

_NAMESPACE = "llama_ray"
_READ_S = 0.5
"""The controller asks ten times a second."""


def tell_standby(application: str, deployed: str, replicas: Mapping[str, int]) -> None:
    """Tell the policies of `application` how many replicas each standby is to have at least, by deployment.

    Only those of the same `deployed` listen: what was told lies in the head's store, and may outlive the application.
    Raises what Ray raises while the head is away.
    """
    text = json.dumps({"deployed": deployed, "replicas": dict(replicas)})
    internal_kv._internal_kv_put(_key(application), text, namespace=_NAMESPACE)


class StandbyPolicy:
    """Serve's policy of a standby: as many replicas as its follower says, and more under load.

    It goes at once when the follower says 0, and otherwise grows only: it is needed for minutes. What the follower said
    last stays while the head is away; before it has said anything, the number stays as it is.
    """

    def __init__(self, deployed: str) -> None:
        self._deployed = deployed
        self._told: dict[str, int] = {}
        self._read_at = -math.inf

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas. Serve calls this."""
        now = time.monotonic()
        if now - self._read_at >= _READ_S:
            self._read_at = now
            self._read(context.app_name or "")
        least = self._told.get(context.deployment_name)
        if least is None:
            return context.target_num_replicas, {}
        if least == 0:
            return 0, {}
        by_load, _ = default_autoscaling_policy(context)
        return max(least, math.ceil(by_load), context.target_num_replicas), {}

    def _read(self, application: str) -> None:
        try:
            text = internal_kv._internal_kv_get(_key(application), namespace=_NAMESPACE)
        # The controller goes on without its head.
        except Exception:
            return
        told = json.loads(text) if text else {}
        if told.get("deployed") == self._deployed:
            self._told = told["replicas"]


def _key(application: str) -> str:
    return f"standby:{application}"
