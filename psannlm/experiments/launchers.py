"""Choice of what trains a study's runs: processes of this machine, or Slurm jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psannlm.errors import ConfigError
from psannlm.experiments.gpu_slots import Placement, place_runs
from psannlm.experiments.local_launcher import Launcher, launch

# Slurm decides how many jobs run at once; this only bounds how many wait.
_MAX_QUEUED = 1_000


@dataclass(frozen=True)
class Launching:
    """How runs are started. ``slurm`` holds the parameters of jobs; None: processes of this machine."""

    placement: Placement
    slurm: dict[str, Any] | None = None

    def launcher(self, study: Path) -> Launcher:
        """Return the launcher for a study in the folder ``study``.

        Raises:
            ConfigError: there is no Slurm here, or submitit is not installed.
        """
        if self.slurm is None:
            return launch
        from psannlm.experiments.slurm_launcher import SlurmLauncher

        return SlurmLauncher(study, self.slurm)


def choose_launching(
    launcher: str,
    devices: Sequence[str],
    *,
    gpus: str | None = None,
    jobs: int | None = None,
    share_gpus: bool = False,
    slurm: Sequence[str] = (),
) -> Launching:
    """Return how runs with ``train.device`` in ``devices`` are started, from the options of ``psannlm compare``.

    Raises:
        ConfigError: the options contradict each other, or name GPUs or settings that do not exist.
    """
    if launcher == "local":
        if slurm:
            raise ConfigError(f"--slurm {slurm[0]} needs --launcher slurm")
        return Launching(place_runs(devices, gpus, jobs, share_gpus))
    if gpus is not None or share_gpus:
        option = "--share-gpus" if gpus is None else f"--gpus {gpus}"
        raise ConfigError(f"{option}: Slurm assigns GPUs to jobs; write --slurm gpus_per_node=1 instead")
    from psannlm.experiments.slurm_launcher import slurm_parameters

    if numbered := [device for device in devices if device.startswith("cuda:")]:
        raise ConfigError(f"--launcher slurm: the plan has train.device: {numbered[0]}; write train.device: cuda")
    return Launching(Placement(jobs or _MAX_QUEUED), slurm_parameters(slurm, devices))
