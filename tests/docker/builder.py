"""Builds the project's Dockerfile with buildah, which needs root, but no daemon and no registry.

The base images are created here from this machine's Debian mirror. They have the tags that the Dockerfile names, so it
is built unchanged.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("buildah", "mmdebstrap")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def install() -> str | None:
    """Install buildah if it is missing; return why it cannot be installed, or None."""
    if os.geteuid() != 0:
        return "building an image without a daemon needs root"
    if all(shutil.which(program) for program in PACKAGES):
        return None
    if not shutil.which("apt-get"):
        return "buildah is not installed, nor is apt-get, which would install it"
    command = "apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "
    done = subprocess.run(command + " ".join(PACKAGES), shell=True, capture_output=True, text=True)
    return None if done.returncode == 0 else f"apt-get: {done.stderr.strip().splitlines()[-1]}"


def find_python(name: str) -> Path | None:
    """Return the folder of an interpreter that holds nothing else of this machine, or None if there is none."""
    candidates = [name]
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip()
        candidates += [str(path) for path in Path(root, "versions").glob(f"*/bin/{name}")]
    for candidate in candidates:
        command = f"{candidate} -c 'import sys; print(sys.base_prefix)'"
        folder = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.strip()
        if folder not in ("", "/usr"):
            return Path(folder)
    return None


class Builder:
    """Builds images in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The host's package index is configured by read-only mounts, never by lines of a Dockerfile.
        self.mounts = [f"--volume={source}:{target}:ro" for source, target in self._index_files().items()]

    def _index_files(self) -> dict[str, str]:
        command = [sys.executable, "-m", "pip", "config", "list"]
        settings = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = dict(re.findall(r"(cert|find-links|index-url|extra-index-url)='([^']*)'", settings))
        config = self.folder / "pip.conf"
        self.folder.mkdir(parents=True, exist_ok=True)
        config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()))
        files = {str(config): "/etc/pip.conf"}
        for value in found.values():
            for url in value.split():
                # The files of a local index are beside its pages.
                place = url.removeprefix("file://").removesuffix("/simple")
                if place.startswith("/") and Path(place).exists():
                    files[place] = place
        if Path(CERTIFICATES).exists():
            files[CERTIFICATES] = CERTIFICATES
        return files

    def buildah(self, *arguments: str) -> str:
        """Run buildah; return its output."""
        store = ("--root", str(self.folder / "store"), "--runroot", str(self.folder / "run"))
        done = subprocess.run(
            ["buildah", *store, *arguments],
            env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"buildah {arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def debian(self, tag: str) -> None:
        """Create a Debian image with Python and pip."""
        where = ("--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian")
        mirrors = subprocess.run(["apt-get", "indextargets", *where], capture_output=True, text=True).stdout.split()
        root = self.folder / "debian.tar"
        command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include=python3-pip,python3-venv"]
        done = subprocess.run([*command, "bookworm", root, *mirrors[:1]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(root), "/")
        self.commit(container, tag)
        root.unlink()

    def add_python(self, container: str, python: Path) -> None:
        """Install an interpreter of this machine, without its packages, before the container's own in ``PATH``.

        Args:
            container: name of the container, whose Debian is this machine's version or a newer one.
            python: folder in which the interpreter is installed.
        """
        archive = self.folder / "python.tar"
        without = ("--exclude=*/site-packages/*", "--exclude=./lib/python3.*/test", "--exclude=__pycache__")
        subprocess.run(["tar", "--create", f"--file={archive}", f"--directory={python}", *without, "."], check=True)
        self.buildah("add", "--quiet", container, str(archive), "/usr/local")
        archive.unlink()
        self.run(container, ["sh", "-ec", "ldconfig; python3 -m ensurepip"], *self.mounts)

    def commit(self, container: str, tag: str) -> None:
        """Create an image from a container, and remove the container."""
        self.buildah("commit", "--quiet", "--format", "docker", "--rm", container, tag)

    def build(self, context: Path, tag: str, *arguments: str) -> str:
        """Build the Dockerfile in a folder; return the output."""
        common = ("--format", "docker", "--pull-never", "--tag", tag)
        return self.buildah("bud", *common, *self.mounts, *arguments, str(context))

    def start(self, tag: str) -> str:
        """Create a container from an image; return its name."""
        return self.buildah("from", "--pull-never", tag).strip()

    def run(self, container: str, command: Sequence[str], *arguments: str) -> str:
        """Run a command in a container; return its output."""
        # The container's host name must resolve; otherwise gloo warns.
        return self.buildah("run", "--hostname", "localhost", *arguments, container, "--", *command)

    def remove(self) -> None:
        """Remove every container and image."""
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder)
