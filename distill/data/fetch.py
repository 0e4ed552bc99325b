"""Packages of fonts and drawings from npm and Debian, by name, with the tools that everyone has."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from distill.data.origins import Package


def fetch_npm(packages: Iterable[Package], node_modules: Path) -> None:
    """Unpack each into `node_modules`/NAME, as npm would install it; nothing of it is run.

    Raises: ValueError if npm is not there or does not have a package, with what else can be done.
    """
    for package in packages:
        with tempfile.TemporaryDirectory() as folder:
            _run(["npm", "pack", package.spec, "--pack-destination", folder, "--silent"], package.spec)
            archives = list(Path(folder).glob("*.tgz"))
            if len(archives) != 1:
                raise ValueError(f"npm pack {package.spec} left {len(archives)} archives; try it by hand")
            target = node_modules / package.name
            partial = target.with_name(f"{target.name}.partial")
            _unpack(archives[0], partial)
            partial.rename(target)


def fetch_debian(packages: Sequence[str], root: Path) -> None:
    """Unpack each into `root`, as dpkg would, without installing it.

    Raises: ValueError if apt-get or dpkg-deb is not there, or a package is not known, with what else can be done.
    """
    for package in packages:
        with tempfile.TemporaryDirectory() as folder:
            _run(["apt-get", "download", package], package, cwd=folder)
            for archive in sorted(Path(folder).glob("*.deb")):
                root.mkdir(parents=True, exist_ok=True)
                _run(["dpkg-deb", "-x", str(archive), str(root)], package)


def _unpack(archive: Path, folder: Path) -> None:
    """The files of a package of npm, without the folder that all of them lie in."""
    with tarfile.open(archive) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.name:
                tar.extract(member, folder, filter="data")


def _run(command: Sequence[str], package: str, *, cwd: str | None = None) -> None:
    instead = f"or unpack {package} yourself and pass the folder with --from"
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not installed, which fetches {package}; install it, {instead}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(f"{' '.join(command[:2])} {package} failed ({said[-1] if said else 'no message'}); {instead}")
