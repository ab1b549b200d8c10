"""Placement of a study's runs on GPUs; the GPUs are faked by their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from psannlm.errors import ConfigError
from psannlm.experiments import runner
from psannlm.experiments.gpu_slots import GpuSlots, Placement, place_runs, visible_gpus
from psannlm.experiments.local_launcher import Process
from psannlm.experiments.model import SizedVariant, Study, StudyRun
from psannlm.experiments.run_state import RunState
from psannlm.experiments.runner import run_all

NAMED = "CUDA_VISIBLE_DEVICES"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that fakes the number of GPUs and the list of visible ones."""

    def fake(n_gpus: int, visible: str | None = None) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: n_gpus)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if visible is None:
            monkeypatch.delenv(NAMED, raising=False)
        else:
            monkeypatch.setenv(NAMED, visible)

    return fake


@pytest.mark.parametrize(
    ("n_gpus", "visible", "found"),
    [
        (8, None, tuple("01234567")),
        (0, None, ()),
        (0, "0,1", ()),
        (0, "", ()),
        (2, "3,5", ("3", "5")),
        (1, "3,-1,5", ("3",)),
        (2, "GPU-8f6a, GPU-11c0", ("GPU-8f6a", "GPU-11c0")),
        (1, "MIG-a1,MIG-b2,MIG-c3", ("MIG-a1", "MIG-b2", "MIG-c3")),
    ],
)
def test_visible_gpus_keep_parents_names(
    gpus: Callable[..., None], n_gpus: int, visible: str | None, found: tuple[str, ...]
) -> None:
    gpus(n_gpus, visible)
    assert visible_gpus() == found


@pytest.mark.parametrize(
    ("device", "options", "jobs", "assigned"),
    [
        ("auto", {}, 8, "01234567"),
        ("cuda", {"jobs": 3}, 3, "01234567"),
        ("auto", {"gpus": "0,2,3"}, 3, "023"),
        ("auto", {"gpus": "5", "jobs": 4, "share_gpus": True}, 4, "5"),
        ("auto", {"gpus": "none", "jobs": 4}, 4, ""),
        ("cpu", {}, 1, ""),
        ("cpu", {"jobs": 16}, 16, ""),
        ("cuda:1", {}, 1, ""),  # one run at a time, where the plan puts it
    ],
)
def test_placement_defaults_to_one_run_per_gpu(
    gpus: Callable[..., None], device: str, options: dict[str, object], jobs: int, assigned: str
) -> None:
    gpus(8)
    placement = place_runs([device, device], **options)  # type: ignore[arg-type]
    assert (placement.jobs, "".join(placement.gpus)) == (jobs, assigned)
    assert placement.is_shared == (bool(assigned) and jobs > len(assigned))


def test_no_gpu_means_one_job(gpus: Callable[..., None]) -> None:
    gpus(0)
    assert place_runs(["auto"]) == Placement(1)
    assert place_runs(["auto"], jobs=4) == Placement(4)


@pytest.mark.parametrize(
    ("n_gpus", "device", "options", "words"),
    [
        (2, "auto", {"jobs": 8}, r"--jobs 8: there are 2 GPUs \(0, 1\); use --jobs 2, or --share-gpus"),
        (1, "auto", {"jobs": 2}, r"there is 1 GPU \(0\)"),
        (2, "auto", {"gpus": "0,7"}, "--gpus 0,7: '7' is not one of the GPUs; there are 0, 1"),
        (2, "auto", {"gpus": "1,1"}, "lists 1 twice"),
        (0, "auto", {"gpus": "all"}, "finds no GPU"),
        (2, "cpu", {"gpus": "all"}, "train.device: cpu"),
        (2, "cuda", {"gpus": "none"}, "--gpus none: the plan has train.device: cuda"),
        (2, "cuda:1", {"gpus": "all"}, "--gpus all: the plan has train.device: cuda:1"),
        (2, "cuda:1", {"jobs": 2}, "--jobs 2: the plan has train.device: cuda:1"),
        (0, "auto", {"share_gpus": True}, "--share-gpus: the runs use no GPU"),
    ],
)
def test_placement_refuses_what_cannot_be(
    gpus: Callable[..., None], n_gpus: int, device: str, options: dict[str, object], words: str
) -> None:
    gpus(n_gpus)
    with pytest.raises(ConfigError, match=words):
        place_runs([device], **options)  # type: ignore[arg-type]


class Step:
    """A run that ends after a number of polls, and notes which GPUs are in use."""

    def __init__(self, name: str, gpu: str, in_use: dict[str, list[str]], done: set[str], n_polls: int) -> None:
        self._name, self._gpu, self._in_use, self._done, self._left = name, gpu, in_use, done, n_polls
        in_use.setdefault(gpu, []).append(name)

    def poll(self) -> int | None:
        self._left -= 1
        if self._left > 0:
            return None
        self._in_use[self._gpu].remove(self._name)
        self._done.add(self._name)
        return 0

    def terminate(self) -> None:
        raise AssertionError("nothing is stopped")


def study_of(n_runs: int, folder: Path) -> Study:
    """Return a study of runs that only have names: nothing of it is trained."""
    sized = SizedVariant(None, None, False, {}, 1, 1, 1, ())  # type: ignore[arg-type]
    runs = [StudyRun(f"run{at}", sized, 0.1, at, None, folder) for at in range(n_runs)]  # type: ignore[arg-type]
    plan = SimpleNamespace(name="faked", path=folder / "plan.yaml")
    return Study(plan, folder, (sized,), tuple(runs), {})  # type: ignore[arg-type]


UUIDS = ",".join(f"GPU-8f6a000{at}" for at in range(8))
# Of MIG instances torch counts the first only.
MIGS = ",".join(f"MIG-11c0000{at}" for at in range(8))


@pytest.mark.parametrize(
    ("n_gpus", "visible", "options"),
    [
        (8, None, {}),
        (8, UUIDS, {"jobs": 8}),
        (1, MIGS, {"jobs": 8}),
        (2, "3,5", {}),
        (2, "3,5", {"jobs": 6, "share_gpus": True}),
    ],
)
def test_twenty_runs_spread_over_gpus(
    gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    n_gpus: int,
    visible: str | None,
    options: dict[str, int],
) -> None:
    """Never more runs on a GPU than its share, every GPU is used, a freed one at once, and all runs end."""
    gpus(n_gpus, visible)
    monkeypatch.setattr("psannlm.runtime.cores._bound_cores", lambda: 64)
    placement = place_runs(["auto"], **options)  # type: ignore[arg-type]
    in_use: dict[str, list[str]] = {}
    done: set[str] = set()
    most: dict[str, int] = {}
    environments = []

    def launcher(run: StudyRun, environment: Mapping[str, str]) -> Process:
        environments.append(environment)
        process = Step(run.name, environment[NAMED], in_use, done, n_polls=1 + 3 * run.seed % 7)
        for gpu, names in in_use.items():
            most[gpu] = max(most.get(gpu, 0), len(names))
        return process

    monkeypatch.setattr(runner, "write_configs", lambda study: None)
    monkeypatch.setattr(runner, "has_same_config", lambda path, config: True)
    monkeypatch.setattr(runner, "read_status", lambda run: RunState(run, "done" if run.name in done else "new"))
    run_all(study_of(20, tmp_path), placement=placement, launcher=launcher, sleep=lambda seconds: None)
    names = visible.split(",") if visible else list("01234567")
    assert len(done) == 20
    assert most == dict.fromkeys(names, placement.jobs // len(names))
    assert {each["OMP_NUM_THREADS"] for each in environments} == {str(64 // placement.jobs)}
    assert [each.get("PSANNLM_SHARED_GPU") for each in environments] == ["1" if "share_gpus" in options else None] * 20


def test_runs_without_gpus_see_none(gpus: Callable[..., None]) -> None:
    gpus(2)
    assert GpuSlots(place_runs(["auto"], gpus="none"), 9).environment(None) == {NAMED: ""}
    assert GpuSlots(place_runs(["cpu"]), 9).environment(None) == {}, "as before: one run at a time has the machine"


def test_few_runs_divide_all_cores(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(8)
    monkeypatch.setattr("psannlm.runtime.cores._bound_cores", lambda: 64)
    slots = GpuSlots(place_runs(["auto"]), n_runs=2)
    assert slots.environment(slots.take()) == {NAMED: "0", "OMP_NUM_THREADS": "32"}
    assert slots.environment(slots.take()) == {NAMED: "1", "OMP_NUM_THREADS": "32"}
