"""Several processes as one program: a thin door to JAX's own multi-controller runtime, with errors that say what to do.

Every process runs the same code on its own devices; collectives go between them (on CPUs by Gloo). When one dies, the
others end too; the run goes on from its last checkpoint.
"""

import dataclasses
import socket
import sys
import threading
import time

import jax


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """This process among all of them."""

    index: int
    count: int

    @property
    def first(self) -> bool:
        """Whether it is the one that writes logs."""
        return self.index == 0


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    *,
    timeout_s: int = 120,
    heartbeat_s: int = 100,
) -> Process:
    """Joins this process to the others; to be called before anything that touches a device.

    `coordinator` is "host:port" of process 0, the same in all of them; under SLURM, Open MPI, Kubernetes or on a TPU
    all three may be left out. A process that is silent for `heartbeat_s` counts as dead. Calling it again with the
    same place is no error.
    Raises: ValueError for arguments that do not fit together; RuntimeError when JAX is in use already, no cluster is
    found, or process 0 does not answer within `timeout_s`. When it answers but some process never comes, JAX ends this
    one after `timeout_s`; a line on the standard error says so before."""
    if len({coordinator is None, processes is None, index is None}) > 1:
        raise ValueError(
            f"start(coordinator={coordinator!r}, processes={processes!r}, index={index!r}): give all three, or none"
            " where the cluster tells them."
        )
    if coordinator is not None and processes is not None and index is not None:
        _check(coordinator, processes, index)
    if jax.distributed.is_initialized():
        if index is not None and (index, processes) != (jax.process_index(), jax.process_count()):
            raise RuntimeError(
                f"start: this process is {jax.process_index()} of {jax.process_count()} already; it cannot become"
                f" {index} of {processes}."
            )
        return Process(jax.process_index(), jax.process_count())
    missing = (
        f"start: process {index} waits for all {processes} processes at {coordinator}, {timeout_s} s at most. Start the"
        " others with the same coordinator, and check that its port is open to them."
    )
    if coordinator is not None and index:
        _wait_for_coordinator(coordinator, timeout_s, missing)
    last_words = threading.Timer(max(0.8 * timeout_s, timeout_s - 2), print, (missing,), {"file": sys.stderr})
    last_words.daemon = True
    last_words.start()  # JAX ends the process when the others do not come, without a chance to raise
    try:
        jax.distributed.initialize(coordinator, processes, index, initialization_timeout=timeout_s,
                                   heartbeat_timeout_seconds=heartbeat_s)  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(_explained(str(error), coordinator, processes, index)) from error
    finally:
        last_words.cancel()
    return Process(jax.process_index(), jax.process_count())


def _check(coordinator: str, processes: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"start(coordinator={coordinator!r}): give host:port of process 0, as in 10.0.0.1:9876.")
    if processes < 1 or not 0 <= index < processes:
        raise ValueError(f"start: process {index} of {processes}. The index runs from 0 to {max(processes - 1, 0)}.")


def _wait_for_coordinator(coordinator: str, timeout_s: float, missing: str) -> None:
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, timeout_s)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(f"{missing} Nobody answered there: {error}.") from error
            time.sleep(0.1)


def _explained(error: str, coordinator: str | None, processes: int | None, index: int | None) -> str:
    if "before any JAX" in error:
        return (
            "start: JAX has computed something already, so its devices are fixed. Call lb.parallel.start first in the"
            " program, before arrays are made and devices counted."
        )
    if coordinator is None:
        return f"start: no cluster was found ({error[:200]}). Pass coordinator='host:port', processes= and index=."
    return f"start: process {index} of {processes} could not join at {coordinator}: {error[:300]}"
