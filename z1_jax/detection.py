"""Which processes belong to a run, where the environment says so: SLURM, Open MPI, TPU pods."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from z1_jax.errors import UserError, first_line

_KNOWN = ("slurm", "ompi", "gcetpu", "gketpu")  # JAX's names; others must be asked for by flags


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of its run; `local_devices`: those of the host's accelerators that are its own."""

    host: str
    port: int
    count: int
    index: int
    local_devices: Sequence[int] | None = None


def detected() -> Place | None:
    """Where JAX finds this process in an environment of several; None where it is alone.

    Raises:
        UserError: the environment is half set.
    """
    from jax._src.clusters import ClusterEnv  # there is no public way to ask before joining

    for cluster in ClusterEnv._cluster_types:
        if cluster.name not in _KNOWN or not cluster.is_env_present():
            continue
        try:
            count = cluster.get_process_count()
            if count == 1:
                return None
            given = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(timeout_secs=60, override_coordinator_port=given)
            host, _, port = address.rpartition(":")
            local = None if cluster.name.endswith("tpu") else cluster.get_local_process_id()
            devices = None if local is None else [local]
            return Place(host, int(port), count, cluster.get_process_id(), devices)
        except (KeyError, ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"{cluster.name} says that this is one of several processes, but not which ({first_line(error)}); give "
                "--coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to work alone"
            ) from error
    return None
