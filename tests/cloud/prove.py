"""Prove that nodes without a network set themselves up, in the words of SkyPilot and of a run: before any test waits.

It prints nothing but what went wrong, in some minutes. ``make cloud-evidence`` runs it with the lab's own Python.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT_S = 900  # a guard: copying torch from the cache takes the longest
HERE = Path(__file__).parent


def commands(cloud: str, wheels: Path) -> str:
    """Return what a node executes: SkyPilot's set-up of its runtime, then that of a run's environment.

    Args:
        cloud: As SkyPilot names it.
        wheels: Folder with SkyPilot's wheel and, in ``run``, ours with the pins of its dependencies.
    """
    from sky.skylet import constants

    (sky,) = [path for path in wheels.iterdir() if path.name != "run"]
    install = constants.RAY_SKYPILOT_INSTALLATION_COMMANDS.replace("{sky_wheel_hash}", sky.name)
    lines = [
        'mkdir -p ~/.sky/wheels "$HOME/run"',
        f"cp -r {shlex.quote(str(sky))} ~/.sky/wheels/",
        constants.UV_INSTALLATION_COMMANDS,
        install.replace("{cloud}", cloud),
        '"$HOME/skypilot-runtime/bin/python" -c "import ray, sky; print(ray.__version__, sky.__version__)"',
        'export PATH="$HOME/.local/bin:$PATH"',
        f'uv venv --quiet --clear --python {sys.version_info.major}.{sys.version_info.minor} "$HOME/run"',
        f"cd {wheels}/run",
        'uv pip install --quiet --python "$HOME/run/bin/python" --constraint pins.txt s3fs ./*.whl',
        '"$HOME/run/bin/python" -P -c "import rsb_cluster.train.worker"',
    ]
    return "\n".join(["set -e", *lines])


def make_wheels(folder: Path) -> None:
    """Write the wheels that a node gets."""
    from sky.backends import wheel_utils

    from rsb_cluster.backends.skypilot import wheel

    built, digest = wheel_utils.build_sky_wheel()
    shutil.copytree(built, folder / digest)
    ours = wheel.build()
    (folder / "run").mkdir()
    (folder / "run" / ours.filename).write_bytes(ours.content)
    (folder / "run" / "pins.txt").write_text("\n".join(wheel.pins()) + "\n")


# A machine of the tests' EC2: the image below, and what it writes in memory.
EC2 = """\
mount -t tmpfs none {stage}
mkdir -p {stage}/upper {stage}/work {stage}/root
mount -t overlay overlay -o lowerdir={image},upperdir={stage}/upper,workdir={stage}/work {stage}/root
cd {stage}/root
mount --rbind /dev dev; mount -t proc proc proc; mount -t tmpfs tmpfs tmp
cp -r {wheels} tmp/wheels; cp {script} tmp/node.sh; chmod -R a+rX tmp/wheels tmp/node.sh
chroot . setpriv --reuid=15000 --regid=15000 --clear-groups env -i $(grep -v '^$' etc/environment) \
  HOME=/home/ubuntu USER=ubuntu PATH=/usr/local/bin:/usr/bin:/bin bash /tmp/node.sh
"""

# A host of the tests' Slurm: this machine's file system with another home, and uv as its installer would put it there.
SLURM = """\
mkdir -p {stage}/home/.local/bin
ln -s {image}/home/ubuntu/.local/bin/uv {stage}/home/.local/bin/uv
env -i UV_OFFLINE=1 UV_CACHE={cache} UV_PROGRAM={image}/usr/local/bin/uv UV_CONSTRAINT={constraints} \
  HOME={stage}/home PATH=/usr/local/bin:/usr/bin:/bin bash {script}
"""


def prove(lab: Path, kind: str, boot: str, cloud: str, wheels: Path, wheels_there: Path) -> str:
    """Set up a node of a kind without a network; return what went wrong, or an empty string."""
    log = lab / f"proof-{kind}.log"
    stage = Path(tempfile.mkdtemp(prefix=f"proof-{kind}-", dir=lab))
    script = stage.with_suffix(".sh")
    script.write_text(commands(cloud, wheels).replace(str(wheels), str(wheels_there)))
    text = boot.format(
        stage=stage,
        image=lab / "image",
        cache=lab / "cache",
        wheels=wheels,
        script=script,
        constraints=HERE / "constraints.txt",
    )
    try:
        with log.open("wb") as output:
            subprocess.run(
                ["unshare", "--net", "--mount", "bash", "-exc", text],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True, timeout=LIMIT_S,
            )  # fmt: skip
    except subprocess.SubprocessError as error:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        return (
            f"a node on {kind} cannot set itself up without a network ({error.__class__.__name__}):\n{last}\nSee {log}."
        )
    finally:
        script.unlink()
        shutil.rmtree(stage)
    return ""


def main(lab: Path) -> str:
    """Prove all kinds of nodes; return what went wrong."""
    with tempfile.TemporaryDirectory(dir=lab) as made:
        os.environ |= {"HOME": f"{made}/home", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}  # SkyPilot writes to ~/.sky
        wheels = Path(made, "wheels")
        wheels.mkdir()
        make_wheels(wheels)
        problems = [
            prove(lab, "Slurm", SLURM, "slurm", wheels, wheels),
            prove(lab, "EC2", EC2, "aws", wheels, Path("/tmp/wheels")),
        ]
    return "\n\n".join(filter(None, problems))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()) or None)
