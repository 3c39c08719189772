#!/usr/bin/env bash
# Install what the tests against the real SkyPilot need, on Debian 12 as root: a virtual environment with SkyPilot, moto
# and this project, and the root file system of the machines that the tests' EC2 boots. All of it has the versions of one
# list, constraints.txt: the machines have no network, and ask for what this machine asked for. Does nothing if all is
# there; a changed list makes all anew.
# usage: tests/cloud/setup.sh FOLDER     (14 GB)
set -euo pipefail

folder=$(mkdir -p "${1:?usage: tests/cloud/setup.sh FOLDER}" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$here/../.." && pwd)
list=$here/constraints.txt
venv=$folder/venv image=$folder/image tools=$folder/tools

packages=(debootstrap openssh-server openssh-client rsync netcat-openbsd)
if ! dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then
  # No system-wide sshd: the tests start their own.
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"
fi

# What was made of another list, or by another script, is of no use.
made=$(cat "$list" "$here/setup.sh" "$here/uv.sh" | sha256sum)
if [ "$(cat "$folder/made" 2>/dev/null)" != "$made" ]; then
  rm -rf "$image" "$venv" "$tools"
  echo "$made" >"$folder/made"
fi

# The versions of the list for each installation, and for what builds packages.
export UV_CONSTRAINT=$list UV_BUILD_CONSTRAINT=$list
if [ ! -x "$tools/bin/uv" ]; then  # of the list, too: another version has another cache
  "$source/.venv/bin/uv" venv --quiet --clear --python 3.11 "$tools"
  "$source/.venv/bin/uv" pip install --quiet --python "$tools/bin/python" uv
fi
uv=$tools/bin/uv

# One cache for this machine and for those of the image: a package is there once, by hard links.
export UV_CACHE_DIR=$image/var/cache/uv
# From where the cache comes is part of its names.
index=$(env | grep -E '^UV_(DEFAULT_INDEX|INDEX|INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS)=' || true)

if [ ! -e "$image/installed" ]; then
  rm -rf "$image" "$venv"
  debootstrap --variant=minbase \
    --include=openssh-server,python3,python3-venv,sudo,ca-certificates,curl,rsync,iproute2,procps,netcat-openbsd,pciutils,lsof,psmisc \
    bookworm "$image" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
  # As cloud images have it: a user who may do anything. The number is one that no one here is likely to have.
  chroot "$image" useradd --create-home --shell /bin/bash --uid 15000 ubuntu
  echo 'ubuntu ALL=(ALL) NOPASSWD:ALL' >"$image/etc/sudoers.d/ubuntu"
  : >"$image/etc/resolv.conf"
  # SkyPilot would install uv and Python 3.10; the machines have no internet, so they find one and make do without the
  # other. What else it installs is in the cache of uv, and most of it is installed, as in SkyPilot's own images.
  install -D -m 755 "$uv" "$image/usr/local/bin/uv"
  install -D -m 755 "$here/uv.sh" "$image/home/ubuntu/.local/bin/uv"
  install -D -m 644 "$list" "$image/etc/cloud-lab.txt"
  install -d "$UV_CACHE_DIR"
  cat >"$image/etc/environment" <<END
UV_OFFLINE=1
UV_CACHE_DIR=/var/cache/uv
UV_CONSTRAINT=/etc/cloud-lab.txt
UV_PROGRAM=/usr/local/bin/uv
UV_VENV_OPTION=--system-site-packages
UV_INSTALL_OPTION=--no-deps
$index
END
  runtime=/home/ubuntu/skypilot-runtime
  chroot "$image" python3 -m venv $runtime
  "$uv" pip install --quiet --python "$image$runtime/bin/python" \
    setuptools click 'ray[default]' pydantic-core patch 'skypilot[aws,slurm,remote]'
  # With which environments begin that SkyPilot makes itself.
  "$uv" venv --quiet --seed --clear --python 3.11 "$folder/seeds" && rm -r "$folder/seeds"
fi

if [ ! "$venv/installed" -nt "$source/pyproject.toml" ]; then
  "$uv" venv --quiet --clear --python 3.11 "$venv"
  "$uv" pip install --quiet --python "$venv/bin/python" --editable "$source" --group "$source/pyproject.toml:test" \
    'skypilot[aws,slurm]' 'moto[ec2,iam,server]'
  "$uv" pip freeze --python "$venv/bin/python" --exclude-editable | sort >"$folder/versions.txt"
  if unlisted=$(grep -vxFf "$list" "$folder/versions.txt"); then
    echo "not in $list: $unlisted. Write it anew: make cloud-constraints" >&2
    exit 1
  fi
  # SkyPilot asks whether the internet is there before it looks at a cluster, and recovers no job without. There is none
  # here, so it asks its own API server instead.
  probe=$venv/lib/python3.11/site-packages/sky/backends/backend_utils.py
  sed -i "s|^_TEST_IP_LIST = .*|_TEST_IP_LIST = [f'http://127.0.0.1:{os.environ.get(\"SKYPILOT_API_SERVER_LOCAL_PORT\")}/api/health']|" "$probe"
  grep -q '^_TEST_IP_LIST = .f.http://127' "$probe"
  touch "$venv/installed"
fi

if [ ! -e "$image/installed" ]; then
  # torch and all that the package needs are in the image, as in a cloud's images for deep learning: 6 GB for each
  # machine would be too much. The versions are those of this machine, which the submission asks for.
  packages=$image/usr/local/lib/python3.11/dist-packages
  "$uv" pip install --quiet --python "$venv/bin/python" --target "$packages" --requirements "$source/pyproject.toml"
  chroot "$image" python3 -m compileall -q -j 0 /usr/local/lib/python3.11/dist-packages /home/ubuntu/skypilot-runtime/lib || true
  chroot "$image" chown -R ubuntu: /home/ubuntu
  touch "$image/installed"
fi
# The machines' user reads and locks it, whoever of this machine has written to it last; uv opens its marks for writing.
find "$UV_CACHE_DIR" \( -type d -o -name "*.lock" -o -name .lock -o -name .git -o -name .gitignore \) -exec chmod a+rwX {} +
chmod a+rw "$UV_CACHE_DIR/CACHEDIR.TAG"
# The nodes of the tests' Slurm are this machine. They write to a cache of their own, of the same files: what root adds to
# the machines' cache is closed to their user.
rm -rf "$folder/cache"
cp -al "$UV_CACHE_DIR" "$folder/cache"
