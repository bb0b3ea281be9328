"""A run's numbers sent to Weights & Biases or trackio. Framework-free; neither package is imported unless asked for.

What is sent is what `metrics.jsonl` gets. The id under which a service knows the run lies in the run folder, so that a
resumed run goes on there.
"""

import importlib
import importlib.util
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any, Literal

from smollm_jax.errors import StorageError, UsageError

Service = Literal["wandb", "trackio"]
PROJECT = "smollm-jax"  # where no environment variable names one
IDS = "tracking.json"  # in the run folder: {service: id}


def check_installed(service: Service) -> None:
    """Raises `UsageError` with the command that installs a service's package, where it is missing."""
    if importlib.util.find_spec(service) is None:
        raise UsageError(f"--track {service} needs the package {service}: pip install {service}")


class Tracker:
    """One run at a service; `log` takes rows of `metrics.jsonl`, `finish` sends what is left.

    Any of the service's own errors may come out of `log` and `finish`.
    """

    def __init__(self, service: Service, run: Path, config: dict[str, Any]):
        """Raises `UsageError` in one line when the service does not start, for instance without an API key."""
        check_installed(service)
        self.service: Service = service
        self._module = importlib.import_module(service)
        start = self._start_wandb if service == "wandb" else self._start_trackio
        try:
            self._run = start(run, _id_of(service, run), config)
        except Exception as error:  # each service has its own
            raise UsageError(f"--track {service}: {first_line(error)}{_HINTS[service]}") from error

    def _start_wandb(self, run: Path, number: str, config: dict[str, Any]) -> Any:
        # Without its copy of the output and its hold on stdout, where a signal and a closed pipe are ours to answer.
        settings = self._module.Settings(console="off")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        started = self._module.init(
            project=project, id=number, name=run.name, dir=str(run), config=config, resume="allow", settings=settings
        )
        # The step is a column of its own: after a resume W&B would drop rows of steps that its count has passed.
        started.define_metric("*", step_metric="step")
        return started

    def _start_trackio(self, run: Path, number: str, config: dict[str, Any]) -> Any:
        # trackio finds a run again by its name, which two run folders may share.
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.name}-{number}"
        return self._module.init(project=project, name=name, config=config, resume="allow", embed=False)

    def log(self, row: dict[str, Any]) -> None:
        """Sends the numbers of a row under its step; what is no finite number is left out."""
        numbers = {name: x for name, x in row.items() if isinstance(x, int | float) and math.isfinite(x)}
        if self.service == "wandb":
            self._run.log(numbers)
        else:
            self._run.log({name: value for name, value in numbers.items() if name != "step"}, step=row["step"])

    def finish(self, *, failed: bool) -> None:
        """Ends the service's run; W&B shows a failed one as such."""
        if self.service == "wandb":
            self._run.finish(exit_code=int(failed))
        else:
            self._module.finish()


_HINTS = {"wandb": "; without an account or a network: WANDB_MODE=offline", "trackio": ""}


def _id_of(service: Service, run: Path) -> str:
    """The id under which a service knows a run, drawn and written down when there is none."""
    path = run / IDS
    try:
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if service not in ids:
            ids[service] = uuid.uuid4().hex[:8]
            path.write_text(json.dumps(ids) + "\n", encoding="utf-8")
        return str(ids[service])
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: is no JSON object of ids: {error}") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error


def first_line(error: Exception) -> str:
    """What an error says in one line, at least its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
