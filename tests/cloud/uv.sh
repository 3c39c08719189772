#!/bin/sh
# The machines' uv. SkyPilot installs itself on Python 3.10, which uv would download; the machine's own 3.11 does as well.
# UV_VENV_OPTION goes to each environment that is made, UV_INSTALL_OPTION to each installation. Where they are
# --system-site-packages and --no-deps, an environment has what the image has, and only what is named is installed:
# uv by itself would copy all of torch. On a Slurm SkyPilot names a cache of its own, which is empty: UV_CACHE is meant.
[ -z "$UV_CACHE" ] || export UV_CACHE_DIR="$UV_CACHE"
case "$1 $2 $*" in
  *"${UV_VENV_OPTION:-no option}"*) ;;
  "venv "*) set -- "$@" $UV_VENV_OPTION ;;
  "pip install "*) set -- "$@" $UV_INSTALL_OPTION ;;
esac
for word; do
  shift
  [ "$word" = 3.10 ] && word=3.11
  set -- "$@" "$word"
done
exec "$UV_PROGRAM" "$@"
