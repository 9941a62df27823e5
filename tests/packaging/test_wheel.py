"""The built wheel, in an environment of its own and run from another folder, is the whole program."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands, in an environment that holds the wheel and sees this one's dependencies."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip("--python", str(python), "install", "--no-index", "--no-deps", str(wheel))
    site = next(home.glob("lib/python*/site-packages"))
    # A .pth entry is searched for modules, but its own .pth files, and so an editable install, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(command: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run([command, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_wheel_holds_the_program_and_nothing_else(wheel: Path) -> None:
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    inside = [name for name in names if not name.parts[0].endswith(".dist-info")]
    assert {name.parts[0] for name in inside} == {"moe_trainer"}
    assert {name.suffix for name in inside} == {".py", ".yaml"}
    yaml = {str(name) for name in inside if name.suffix == ".yaml"}
    assert yaml == {
        f"moe_trainer/_{folder}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder in ("configs", "recipes")
        for path in (ROOT / folder).rglob("*.yaml")
    }


def test_installed_commands_know_their_configs(scripts: Path, tmp_path: Path) -> None:
    where = run(scripts / "python", "-c", "import moe_trainer; print(moe_trainer.__file__)", folder=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(scripts.parent), where
    listed = run(scripts / "moe-train", folder=tmp_path)
    assert listed.returncode == 2 and "+recipe=mixtral_sp_ep " in listed.stderr
    assert "optim.lr=" in run(scripts / "moe-train", "--help", folder=tmp_path).stdout
    mistake = run(scripts / "moe-train", "+recipe=mixtral_sp_ep", "parallel.ep=3", folder=tmp_path)
    assert (mistake.returncode, mistake.stderr) == (2, "moe-train: parallel.ep=3 must divide fsdp(2) x tp(2)\n")
    for command, line in (("moe-generate", "checkpoint=DIR must"), ("moe-checkpoint", "the first argument")):
        done = run(scripts / command, folder=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith(f"{command}: {line}")
    assert not list(tmp_path.iterdir())


def test_installed_program_trains(scripts: Path, tmp_path: Path) -> None:
    done = run(scripts / "moe-train", "+recipe=mixtral_sp_ep", "parallel.fsdp=1", "steps=2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    run_folder = tmp_path / "runs" / "mixtral_sp_ep"
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run_folder / "checkpoints" / "step-00000002" / "COMMIT.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
