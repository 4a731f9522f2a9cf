"""The wheel contains the package, configs/ and launch/, and no other top-level name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_lion.errors import EnvironmentFault
from megatron_lion.shipped import shipped_folder

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, because setuptools leaves build/ behind; without isolation, because the network may be absent.
    source = folder / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if name.startswith(("megatron_lion/", "configs/", "launch/", "data_prep/")) or "/" not in name:
            path = REPO / name
            if path.is_file():
                copy = source / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('../dist'))"
    (folder / "dist").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / "dist" / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_configs_and_launchers(installed: Path) -> None:
    for name in ("configs", "launch"):
        files = {path.name: path.read_bytes() for path in (REPO / name).iterdir()}
        assert {path.name: path.read_bytes() for path in (installed / "megatron_lion" / name).iterdir()} == files
    assert (installed / "megatron_lion" / "launch" / "torchrun.sh").stat().st_size > 1000
    assert (installed / "megatron_lion" / "optim" / "lion.cpp").is_file()


def test_wheel_claims_one_top_level_name(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"megatron_lion"}


def test_installed_package_finds_its_configs(installed: Path) -> None:
    code = "from megatron_lion.shipped import shipped_folder; print(shipped_folder('configs'))"
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=installed, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == installed / "megatron_lion" / "configs"


def test_checkout_uses_its_own_folder_and_absence_is_reported(tmp_path: Path) -> None:
    assert shipped_folder("launch") == REPO / "launch"
    with pytest.raises(EnvironmentFault, match="installed without its configs/ folder"):
        shipped_folder("configs", tmp_path / "megatron_lion")
