#!/bin/sh
# Installs the package for this machine's accelerator: a notebook's first line calls it.
set -eu
extras=plots
if [ -e /dev/nvidia0 ]; then extras=$extras,cuda; fi
if [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then extras=$extras,tpu; fi
python3 -m pip install --quiet "$(dirname "$0")/..[$extras]"
