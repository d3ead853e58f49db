"""What gets installed: `pvae.models`, from a wheel and editable alike, and a light `import pvae`.

The project's own build backend builds both, without a network, from a copy of the sources, so that
the tree stays clean. They are tried in a Python that was started with `-S`: it sees one of them and
the dependencies, but not the installation under which the tests run.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHERE = "import pvae, pvae.models.vae, sys; print(sys.modules['pvae.models.vae'].__file__)"
SLOW_TO_IMPORT = SETTINGS["tool"]["ruff"]["lint"]["flake8-tidy-imports"][
    "banned-module-level-imports"
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("pvae", "models"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def build(kind: str, sources: Path, into: Path) -> Path:
    """Let the build backend make a `wheel` or an `editable` wheel, and unpack it into a folder."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True)
    (wheel,) = into.glob("*.whl")
    installed = into / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    return installed


def run(code: str, installed: Path, cwd: Path) -> str:
    """Return what code prints in a Python that sees one installation and the dependencies."""
    paths = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    start = f"import site, sys; site.addsitedir({paths[0]!r}); sys.path += {paths[1:]!r}; "
    command = [sys.executable, "-S", "-c", start + code]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_package_folder_is_declared():
    folders = {path.parent for path in (ROOT / "pvae").rglob("__init__.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == names | {"pvae.models"}


def test_a_wheel_holds_the_models_and_the_type_marker(sources, tmp_path):
    installed = build("wheel", sources, tmp_path)
    written = {path.name for path in (ROOT / "models").glob("*.py")}
    assert {path.name for path in (installed / "pvae" / "models").glob("*.py")} == written
    assert (installed / "pvae" / "py.typed").exists()
    assert not (installed / "models").exists()
    assert run(WHERE, installed, tmp_path) == str(installed / "pvae" / "models" / "vae.py")


def test_an_editable_install_reads_the_models_where_they_are_written(sources, tmp_path):
    installed = build("editable", sources, tmp_path)
    assert run(WHERE, installed, tmp_path) == str(sources / "models" / "vae.py")


def test_importing_pvae_loads_nothing_heavy_that_pyro_does_not(sources, tmp_path):
    """Torch and Pyro may load such a library themselves; then it costs pvae nothing."""
    code = (
        "import json, pyro; before = set(sys.modules); "
        "import pvae; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    added = json.loads(run(code, build("editable", sources, tmp_path), tmp_path))
    assert "pvae" in added
    assert {name.split(".")[0] for name in added} & {*SLOW_TO_IMPORT, "typer"} == set()


def test_what_the_readme_writes_after_pvae_is_there_and_listed(sources, tmp_path):
    """In a process of its own: the tests have imported modules that a user has not."""
    written = set(re.findall(r"\bpvae\.(\w+)", (ROOT / "README.md").read_text()))
    code = "import json, pvae; print(json.dumps([dir(pvae), pvae.__all__]))"
    found, listed = json.loads(run(code, build("editable", sources, tmp_path), tmp_path))
    assert "plots" in written
    assert written <= set(found)
    assert written <= set(listed)
