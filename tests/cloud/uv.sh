#!/bin/sh
# SkyPilot installs itself on Python 3.10, which uv would download; the machine's own 3.11 does as well.
for word; do
  shift
  [ "$word" = 3.10 ] && word=3.11
  set -- "$@" "$word"
done
exec /usr/local/bin/uv "$@"
