"""Sends the metrics of a run to Weights & Biases or trackio. Framework-free; imports either package only on request.

It sends the rows of `metrics.jsonl`. The service's id of the run is stored in the run folder, so that a resumed run
continues under it.
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
PROJECT = "smollm-jax"  # unless an environment variable names another
IDS = "tracking.json"  # in the run folder: {service: id}


def check_installed(service: Service) -> None:
    """Raises `UsageError` with the command that installs the package of a service, if it is missing."""
    if importlib.util.find_spec(service) is None:
        raise UsageError(f"--track {service} needs the package {service}: pip install {service}")


class Tracker:
    """One run at a service; `log` takes rows of `metrics.jsonl`, `finish` sends pending rows.

    `log` and `finish` may raise any error of the service's package.
    """

    def __init__(self, service: Service, run: Path, config: dict[str, Any]):
        """Raises `UsageError`, in one line, if the service does not start, for instance without an API key."""
        check_installed(service)
        self.service: Service = service
        self._module = importlib.import_module(service)
        start = self._start_wandb if service == "wandb" else self._start_trackio
        try:
            self._run = start(run, _id_of(service, run), config)
        except Exception as error:  # each service raises its own types
            raise UsageError(f"--track {service}: {first_line(error)}{_HINTS[service]}") from error

    def _start_wandb(self, run: Path, run_id: str, config: dict[str, Any]) -> Any:
        # Otherwise wandb wraps stdout, which breaks our handling of signals and closed pipes.
        settings = self._module.Settings(console="off")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        wandb_run = self._module.init(
            project=project, id=run_id, name=run.name, dir=str(run), config=config, resume="allow", settings=settings
        )
        # Use our step as the x-axis: W&B drops rows whose step is below its own counter, as after a resume.
        wandb_run.define_metric("*", step_metric="step")
        return wandb_run

    def _start_trackio(self, run: Path, run_id: str, config: dict[str, Any]) -> Any:
        # trackio identifies a run by its name, and two run folders may have the same name.
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.name}-{run_id}"
        return self._module.init(project=project, name=name, config=config, resume="allow", embed=False)

    def log(self, row: dict[str, Any]) -> None:
        """Sends the finite numbers of a row under its step."""
        numbers = {name: x for name, x in row.items() if isinstance(x, int | float) and math.isfinite(x)}
        if self.service == "wandb":
            self._run.log(numbers)
        else:
            self._run.log({name: value for name, value in numbers.items() if name != "step"}, step=row["step"])

    def finish(self, *, failed: bool) -> None:
        """Ends the run at the service, in W&B marked as failed if it is."""
        if self.service == "wandb":
            self._run.finish(exit_code=int(failed))
        else:
            self._module.finish()


_HINTS = {"wandb": "; without an account or a network: WANDB_MODE=offline", "trackio": ""}


def _id_of(service: Service, run: Path) -> str:
    """The service's id of a run, generated and stored in the run folder on first use."""
    path = run / IDS
    try:
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if service not in ids:
            ids[service] = uuid.uuid4().hex[:8]
            path.write_text(json.dumps(ids) + "\n", encoding="utf-8")
        return str(ids[service])
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: is not a JSON object of run ids: {error}") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
