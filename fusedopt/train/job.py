"""From the command line to a job: everything that can be checked before training, on each rank for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import require_interpreter
from . import checkpoint, settings, task
from . import config as config_module
from .checks import check
from .config import DEFAULT_OUT, TrainConfig
from .errors import BadInput
from .optimizers import DEFAULTS, check_optimizer, check_schedule
from .parallel import ALONE, UNCHOSEN, Ranks


@dataclass(frozen=True)
class Job:
    """What to train, where, and from which checkpoint. inexact: why it will not continue that to the same bits."""

    config: TrainConfig
    task: task.Task
    folder: Path
    environment: dict[str, Any]
    saved: dict[str, Any] | None
    inexact: list[str]
    ranks: Ranks

    @property
    def start(self) -> int:
        """The step after which training begins."""
        return self.saved["step"] if self.saved else 0


def settle(given: dict[str, Any], resume: bool, overwrite: bool, allow_inexact: bool, ranks: Ranks) -> Job:
    """The job that settings ask for, `out` among them. BadInput for what cannot work."""
    if ranks.mode == UNCHOSEN:
        raise BadInput(
            f"torchrun started {ranks.world} ranks, and each would train by itself: add --parallel ddp or fsdp"
        )
    if resume and overwrite:
        raise BadInput("--resume continues a run, --overwrite starts it anew: choose one")
    folder = Path(given.get("out") or DEFAULT_OUT)
    given = {**settings.normalised(given), "out": str(folder)}
    saved = checkpoint.load(folder) if resume else None
    config, loaded = configure(given, saved["config"] if saved else None, ranks)
    if ranks.first:
        prepare_folder(folder, resume, overwrite)
    environment = checkpoint.describe_environment(config, loaded.digest, ranks)
    inexact = checkpoint.check_continues(saved, config, environment, allow_inexact) if saved else []
    return Job(config, loaded, folder, environment, saved, inexact, ranks)


def configure(given: dict[str, Any], saved: TrainConfig | None, ranks: Ranks = ALONE) -> tuple[TrainConfig, task.Task]:
    """Every setting, and the task with its data: what `given` leaves open is as in `saved`, else by default."""
    device = pick_device(given.pop("device", None) or "auto", saved, ranks)
    given["device"] = device

    def fill(values: dict[str, Any]) -> TrainConfig:
        return config_module.override(saved, values) if saved else config_module.fill(values, device, DEFAULTS)

    draft = fill({name: value for name, value in given.items() if name not in settings.BY_DATA})
    if draft.backend == "triton" and device == "cpu":
        require_interpreter()
    loaded = task.load(draft.task, draft.text, draft.tokenizer, draft.vocabulary_size)
    config = fill(settings.sized(given, draft, loaded))
    check(config)
    check_parallel(config, ranks)
    loaded.check(config)
    check_schedule(config, loaded)
    check_optimizer(config)
    return config, loaded


def validated(given: dict[str, Any]) -> TrainConfig:
    """The settings of a run that `given` asks for, without running it. BadInput for what cannot work."""
    return configure(settings.normalised(given), None)[0]


def pick_device(wanted: str, saved: TrainConfig | None, ranks: Ranks) -> str:
    """The device's name: what the user wants, else where the run began, else a GPU when there is one.

    Of several GPUs each rank makes its own the current one.
    """
    import torch

    available = torch.cuda.is_available()
    if wanted == "auto":
        wanted = saved.device if saved else "cuda" if available else "cpu"
    if wanted == "cuda" and not available:
        reason = "the checkpoint is of a run on a GPU" if saved and saved.device == "cuda" else "--device cuda"
        raise BadInput(f"{reason}, but PyTorch finds no GPU here")
    if wanted == "cuda" and not ranks.alone:
        count = torch.cuda.device_count()
        if ranks.local >= count:
            raise BadInput(f"PyTorch finds {count} GPUs here, torchrun started more ranks: --nproc-per-node {count}")
        torch.cuda.set_device(ranks.local)
    return wanted


def check_parallel(config: TrainConfig, ranks: Ranks) -> None:
    """Raise BadInput for what several ranks cannot do."""
    if config.batch_size % ranks.world:
        raise BadInput(
            f"--batch-size {config.batch_size} is shared out among {ranks.world} ranks: make it a multiple of that"
        )
    if ranks.mode == "fsdp" and config.compare == "torch":
        raise BadInput("--compare torch trains whole copies of the model: use --parallel ddp for it, or one process")


def check_agreement(job: Job) -> None:
    """Refuse ranks that see other files than the first, and shards that are damaged; on every rank at once.

    Raises:
        BadInput, Reported: as `Ranks.check`.
    """
    text, start = job.ranks.gather((job.environment["data"], job.start))[0]

    def compare() -> None:
        if job.start != start:
            raise BadInput(f"{job.folder} holds another checkpoint than on rank 0: all ranks must share the folder")
        if job.environment["data"] != text:
            raise BadInput("its data is not that of rank 0: name files with --text that are the same everywhere")
        if job.saved:
            checkpoint.check_shards(job.folder, job.saved, job.ranks)

    job.ranks.together(compare)


def prepare_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Create the output folder and see that it can be written; refuse to bury an earlier run."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if not (resume or overwrite) and any((folder / name).exists() for name in ("checkpoint.pt", "metrics.jsonl")):
            raise BadInput(f"{folder} already holds a run: add --resume or --overwrite, or choose another --out")
    except OSError as error:
        raise BadInput(f"cannot write to output folder {folder}: {error.strerror}") from None
