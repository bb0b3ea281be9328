"""`make` chooses the build of JAX for the NVIDIA driver, or prints one line that says why none fits."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADER = "| NVIDIA-SMI {0}    Driver Version: {0}    CUDA Version: {1}     |"
SINCE_610 = "| NVIDIA-SMI 610.57.04    KMD Version: 610.57.04    CUDA UMD Version: 13.3     |"
INSTEAD = "or leave the GPU alone: make JAX= train"
UNNAMED = "error: nvidia-smi names no CUDA version, it says: "


def make(folder: Path, nvidia_smi: str | None, *arguments: str, compute_cap: str = "9.0", status: int = 0):
    """Runs `make` with a fake nvidia-smi that prints this."""
    if nvidia_smi is not None:
        query = f"case $* in *compute_cap*) echo {compute_cap}; exit;; esac"
        (folder / "said").write_text(f"{nvidia_smi}\n")
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{query}\ncat {folder}/said\nexit {status}\n")
        (folder / "nvidia-smi").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("nvidia_smi", "compute_cap", "build"),
    [
        (HEADER.format("525.60.13", "12.0"), "8.6", "CUDA 12: jax[cuda12]"),
        (HEADER.format("570.133.07", "12.8"), "12.0", "CUDA 12: jax[cuda12]"),
        (HEADER.format("580.65.06", "13.0"), "9.0", "CUDA 13: jax[cuda13]"),
        (SINCE_610, "8.9", "CUDA 13: jax[cuda13]"),
        (HEADER.format("700.00", "14.1"), "9.0", "CUDA 14: jax[cuda13]"),
        (HEADER.format("580.65.06", "13.0"), "7.0", "CUDA 13: jax[cuda12]"),  # a V100
        (HEADER.format("580.65.06", "13.0"), "[N/A]", "CUDA 13: jax[cuda13]"),
    ],
)
def test_the_driver_decides_which_jax_is_installed(tmp_path, nvidia_smi, compute_cap, build):
    result = make(tmp_path, f"Sat Nov 28 12:00:00 2026\n{nvidia_smi}", "driver", compute_cap=compute_cap)
    assert (result.returncode, result.stdout, result.stderr) == (0, build + "\n", "")
    planned = make(tmp_path, nvidia_smi, "-n", "train", f"VENV={tmp_path}/venv", compute_cap=compute_cap)
    assert f'".[gguf,plot,{build[-7:-1]}]"' in planned.stdout


@pytest.mark.parametrize(
    ("nvidia_smi", "status", "line"),
    [
        (
            HEADER.format("470.256.02", "11.4"),
            0,
            "error: the NVIDIA driver here supports CUDA 11, JAX needs 12 or newer: install driver 525 or newer, "
            f"{INSTEAD}",
        ),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.65",
            18,
            f"{UNNAMED}Failed to initialize NVML: Driver/library version mismatch; mend the driver, {INSTEAD}",
        ),
        (
            f"Sat Nov 28 12:00:00 2026\n{HEADER.format('535.54', 'N/A')}",
            0,
            f"{UNNAMED}{HEADER.format('535.54', 'N/A')}; mend the driver, {INSTEAD}",
        ),
        ("", 1, f"{UNNAMED}nothing; mend the driver, {INSTEAD}"),
    ],
)
@pytest.mark.parametrize("target", ["train", "test"])
def test_a_driver_that_fits_no_jax_is_refused_in_one_line(tmp_path, nvidia_smi, status, line, target):
    result = make(tmp_path, nvidia_smi, target, f"VENV={tmp_path}/venv", "PYTHON=false", status=status)
    ours, *of_make = result.stderr.splitlines()
    assert ours == line
    assert result.returncode == 2
    assert len(of_make) == 1
    assert "driver] Error 2" in of_make[0]
    assert not (tmp_path / "venv").exists()


def test_a_driver_may_be_left_alone_and_a_machine_have_none(tmp_path):
    result = make(tmp_path, HEADER.format("470.256.02", "11.4"), "-n", "train", "JAX=", f"VENV={tmp_path}/venv")
    assert '".[gguf,plot]"' in result.stdout
    assert make(tmp_path, HEADER.format("470.256.02", "11.4"), "driver", "JAX=").returncode == 0
    (tmp_path / "nvidia-smi").unlink()
    assert make(tmp_path, None, "driver").returncode == 0


def test_what_a_rented_machine_lacks_is_fetched_by_one_command():
    planned = subprocess.run(["make", "-n", "gpu-wheels"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (fetch,) = [line for line in planned.replace("\\\n", " ").splitlines() if " pip download " in line]
    assert fetch.split()[-4:] == ["tyro", "docstring-parser", "typeguard", "gguf"]
    assert ".whl/" in (ROOT / ".gitignore").read_text().split()


@pytest.mark.parametrize(
    ("programs", "user", "arguments", "printed"),
    [
        (("chromium",), 0, (), ""),
        (("google-chrome",), 0, (), ""),
        ((), 0, ("BROWSER=no",), ""),
        (("apt-get",), 1000, (), "no Chromium: the page is not tested in a browser; install chromium by the system's"),
        ((), 0, (), "no Chromium: the page is not tested in a browser; install chromium by the system's"),
        (("apt-get",), 0, (), "installing Chromium by apt-get to test the page in it; make BROWSER=no leaves it out"),
    ],
)
def test_chromium_is_installed_only_where_there_is_none_and_said_so_before(
    tmp_path, programs, user, arguments, printed
):
    for name in ("sh", "sed", "head", "awk", "grep", "ls"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, line in {"id": f"echo {user}", **dict.fromkeys(programs, f'echo "$@" >> {tmp_path}/called')}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        [shutil.which("make"), "--no-print-directory", "browser", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(printed)
    assert len(result.stdout.splitlines()) == bool(printed)
    installs = printed.startswith("installing")
    assert (tmp_path / "called").exists() == installs
    if installs:
        assert (tmp_path / "called").read_text() == "update -qq\ninstall -y -qq --no-install-recommends chromium\n"


def test_the_browser_can_be_left_out():
    planned = subprocess.run(["make", "-n", "test", "BROWSER=no"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "SMOLLM_WITHOUT_BROWSER=1" in planned.stdout
