"""Placement of a study's runs on the GPUs of this machine: which GPU each run may see, and how many run at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from psannlm.errors import ConfigError, nearest
from psannlm.io.run_metadata import SHARED_GPU_VARIABLE, VISIBLE_GPUS_VARIABLE
from psannlm.runtime.cores import threads_for


def visible_gpus() -> tuple[str, ...]:
    """Return the entries of ``CUDA_VISIBLE_DEVICES`` as written (indices, UUIDs, MIG names), else the GPUs' indices."""
    n_gpus = torch.cuda.device_count()
    named = os.environ.get(VISIBLE_GPUS_VARIABLE)
    if named is None:
        return tuple(map(str, range(n_gpus)))
    entries = [entry.strip() for entry in named.split(",") if entry.strip()]
    # One process sees only its first MIG instance, however many are named. Of other entries CUDA uses those before the
    # first that names no GPU, and torch counts them.
    is_mig = n_gpus > 0 and all(entry.startswith("MIG-") for entry in entries)
    return tuple(entries if is_mig else entries[:n_gpus])


@dataclass(frozen=True)
class Placement:
    """Where the runs of a study are trained.

    Attributes:
        jobs: number of runs at the same time.
        gpus: entries of ``CUDA_VISIBLE_DEVICES``, one for each run; empty: no GPU is assigned.
        is_shared: whether a GPU may have several runs, so that their throughput says nothing.
        hides_gpus: whether runs see no GPU at all.
    """

    jobs: int = 1
    gpus: tuple[str, ...] = ()
    is_shared: bool = False
    hides_gpus: bool = False

    def as_dict(self) -> dict[str, object]:
        """Return what ``study.json`` records."""
        return {"jobs": self.jobs, "gpus": list(self.gpus), "share_gpus": self.is_shared}


def place_runs(
    devices: Sequence[str], gpus: str | None = None, jobs: int | None = None, share_gpus: bool = False
) -> Placement:
    """Return the placement of runs whose configurations have ``train.device`` in ``devices``.

    Args:
        gpus: ``all``, ``none``, or entries of :func:`visible_gpus` separated by commas; None: all if the runs can use
            them.
        jobs: number of runs at the same time; None: one for each GPU, one without GPUs.
        share_gpus: allow more jobs than GPUs.

    Raises:
        ConfigError: the GPUs do not exist, or do not fit the devices or the number of jobs.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: use 1 or more")
    chosen = _chosen(devices, gpus, jobs)
    if not chosen:
        if share_gpus:
            raise ConfigError("--share-gpus: the runs use no GPU; leave the option out")
        return Placement(jobs or 1, hides_gpus=gpus == "none")
    if jobs is not None and jobs > len(chosen) and not share_gpus:
        has = f"{len(chosen)} GPU{'' if len(chosen) == 1 else 's'} ({', '.join(chosen)})"
        raise ConfigError(
            f"--jobs {jobs}: there {'is' if len(chosen) == 1 else 'are'} {has}; use --jobs {len(chosen)}, or "
            "--share-gpus, which leaves throughput out of the results"
        )
    jobs = jobs or len(chosen)
    return Placement(jobs, chosen, jobs > len(chosen))


def _chosen(devices: Sequence[str], gpus: str | None, jobs: int | None) -> tuple[str, ...]:
    """Return the GPUs to assign. Raises ConfigError if they do not exist or the devices rule them out."""
    needing = sorted({device for device in devices if device.startswith("cuda")})
    numbered = [device for device in needing if ":" in device]
    if gpus == "none":
        if needing:
            raise ConfigError(f"--gpus none: the plan has train.device: {needing[0]}; write auto or cpu there")
        return ()
    if gpus is None:
        found = visible_gpus() if set(devices) != {"cpu"} else ()
        if not (found and numbered):
            return found
        if jobs is None or jobs == 1:
            return ()  # one run at a time, on the GPU that the plan names
    elif set(devices) == {"cpu"}:
        raise ConfigError(f"--gpus {gpus}: the plan has train.device: cpu; write auto or cuda there")
    if numbered:
        option = f"--jobs {jobs}" if gpus is None else f"--gpus {gpus}"
        raise ConfigError(
            f"{option}: the plan has train.device: {numbered[0]}, and each run would see a single GPU, number 0; write "
            "train.device: cuda"
        )
    return _listed(gpus or "all", visible_gpus())


def _listed(gpus: str, found: tuple[str, ...]) -> tuple[str, ...]:
    """Return the entries of ``found`` that ``gpus`` lists. Raises ConfigError for any other."""
    if not found:
        raise ConfigError(f"--gpus {gpus}: torch {torch.__version__} finds no GPU; leave the option out")
    if gpus == "all":
        return found
    wanted = tuple(entry.strip() for entry in gpus.split(","))
    for at, entry in enumerate(wanted):
        if entry in wanted[:at]:
            raise ConfigError(f"--gpus {gpus}: lists {entry} twice")
        if entry not in found:
            names = f"{VISIBLE_GPUS_VARIABLE} lists" if VISIBLE_GPUS_VARIABLE in os.environ else "there are"
            raise ConfigError(
                f"--gpus {gpus}: {entry!r} is not one of the GPUs{nearest(entry, found)}; {names} {', '.join(found)}"
            )
    return wanted


@dataclass
class GpuSlots:
    """The GPUs of a placement, each with the number of runs on it now.

    ``n_runs`` is the number of all runs: fewer than jobs get more threads each.
    """

    placement: Placement
    n_runs: int
    _n_runs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start with no run on any GPU."""
        self._n_runs = dict.fromkeys(self.placement.gpus, 0)

    def take(self) -> str | None:
        """Return the GPU with the fewest runs, the first of several, and count a run on it; None without GPUs."""
        if not self._n_runs:
            return None
        gpu = min(self._n_runs, key=self._n_runs.__getitem__)
        self._n_runs[gpu] += 1
        return gpu

    def free(self, gpu: str | None) -> None:
        """Count one run less on ``gpu``."""
        if gpu is not None:
            self._n_runs[gpu] -= 1

    def environment(self, gpu: str | None) -> dict[str, str]:
        """Return the environment variables of a run on ``gpu``: what it may see, and its number of threads."""
        placement = self.placement
        at_once = min(placement.jobs, self.n_runs)
        settings = threads_for(at_once) if at_once > 1 else {}
        if placement.hides_gpus:
            settings[VISIBLE_GPUS_VARIABLE] = ""
        elif gpu is not None:
            settings[VISIBLE_GPUS_VARIABLE] = gpu
            if placement.is_shared:
                settings[SHARED_GPU_VARIABLE] = "1"
        return settings
