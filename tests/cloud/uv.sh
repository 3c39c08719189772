#!/bin/sh
# The machines' uv. SkyPilot installs itself on Python 3.10, which uv would download; the machine's own 3.11 does as well.
# UV_VENV_OPTION goes to each environment that is made: with --system-site-packages it has what the image has.
[ "$1" = venv ] && case "$*" in *"$UV_VENV_OPTION"*) ;; *) set -- "$@" "$UV_VENV_OPTION" ;; esac
for word; do
  shift
  [ "$word" = 3.10 ] && word=3.11
  set -- "$@" "$word"
done
exec "$UV_PROGRAM" "$@"
