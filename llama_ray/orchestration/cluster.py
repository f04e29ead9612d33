"""The connection to a Ray cluster."""

from __future__ import annotations

import os
import socket

import ray
from ray._private import services

from llama_ray.utils.errors import UserError, first_line

_VARIABLE = "RAY_ADDRESS"
_ANSWERS_WITHIN_S = 10.0


def connect(*, log_to_driver: bool = True) -> None:
    """Connect to the cluster of RAY_ADDRESS or to one that runs on this machine; without either, start a local one.

    Raises UserError, within seconds, if no cluster answers there.
    """
    named = os.environ.get(_VARIABLE, "")
    if "://" in named:
        raise UserError(
            f"{_VARIABLE} is {named}; it must be HOST:PORT of a cluster, auto or local; from outside the cluster give "
            "that address to `ray job submit --address` and let the job find its cluster by itself"
        )
    try:
        # Ray finds the address again; by itself it would wait a minute or more for a cluster that is gone.
        address = services.canonicalize_bootstrap_address(named or None)  # type: ignore[arg-type]  # it takes None
        if address is not None:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError, ValueError) as error:
        where = f"{_VARIABLE} is {named}" if named else "a cluster of this machine has left its address"
        raise UserError(
            f"{where}, but no Ray cluster answers there ({first_line(error)}); start one with `ray start --head`, or "
            + (f"correct or unset {_VARIABLE}" if named else "run `ray stop` to forget it")
        ) from error
    ray.init(log_to_driver=log_to_driver)
