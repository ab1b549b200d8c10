"""One command line to N processes on this machine, each a rank of one training; its exit code comes back."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from psannlm.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, ConfigError, DeviceError
from psannlm.lifeline import LAUNCHED

# torchrun kills 30 s after it has passed a signal on; a large checkpoint takes longer.
_STOP_S = 3600


def check_launch(n_ranks: int, device: str) -> None:
    """Refuse what cannot be launched, once and before there is any rank.

    Raises:
        ConfigError: fewer than one rank, or this process is a rank itself.
        DeviceError: there is no GPU for every rank.
    """
    if n_ranks < 1:
        raise ConfigError(f"--nproc {n_ranks}: give the number of processes, 1 or more")
    if "RANK" in os.environ:
        raise ConfigError(
            "--nproc starts the ranks by itself, and torchrun has started this one; leave one of them out"
        )
    if device.startswith("cuda:") and n_ranks > 1:
        raise ConfigError(f"train.device {device} is one GPU for {n_ranks} ranks; use device: cuda, one GPU for each")
    import torch

    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if n_gpus and n_ranks > n_gpus:
        raise DeviceError(f"--nproc {n_ranks} needs as many GPUs, and there are {n_gpus}; use --nproc {n_gpus}")


def launch(arguments: Sequence[str], n_ranks: int) -> int:
    """Run ``psannlm`` with ``arguments`` in ``n_ranks`` processes under torchrun; return the exit code.

    Ctrl-C and SIGTERM are passed on, and the ranks may take their time to save. When a rank fails, the others are
    ended. What a rank has to say of its error it says itself.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun's own account of a signal or a failure is for those who debug torch.
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_STOP_S))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_ranks)))
    os.environ[LAUNCHED] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "psannlm", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        sys.stderr.write(f"error: rank {rank} was ended by {name}; the others were stopped\n")
        return EXIT_FAILED
    except SignalException:
        return EXIT_INTERRUPTED
    finally:
        logging.disable(logging.NOTSET)
    return EXIT_OK
