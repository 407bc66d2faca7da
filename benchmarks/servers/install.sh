#!/usr/bin/env bash
# A virtual environment for each server, on top of the packages of the interpreter that has torch.
#
#   benchmarks/servers/install.sh DIR SERVER...             for example: install.sh venvs litserve mosec
#   WHEELS=FOLDER benchmarks/servers/install.sh ...         without a network
#   DOWNLOAD=FOLDER benchmarks/servers/install.sh DIR SERVER...   fill that folder instead
#
# PYTHON is the interpreter (default: python3). The driver is told of them: --python litserve=DIR/litserve/bin/python
set -euo pipefail
root=$1
shift
python=${PYTHON:-python3}
declare -A packages=(
    [litserve]="litserve==0.2.19"
    [mosec]="mosec==0.9.8"
    [ray]="ray[serve]==2.60.0"
    [torchserve]="torchserve==0.12.0 torch-model-archiver==0.12.0 pyyaml psutil"
    [pytriton]="nvidia-pytriton==0.7.0"
)
if [[ -n ${DOWNLOAD:-} ]]; then
    for server in "$@"; do
        "$python" -m pip download --quiet --dest "$DOWNLOAD" ${packages[$server]}
    done
    exit
fi
base=$("$python" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent.parent)')
for server in "$@"; do
    "$python" -m venv "$root/$server"
    own=$("$root/$server/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$base" >"$own/base.pth" # what is installed here goes before it
    "$root/$server/bin/python" -m pip install --quiet ${WHEELS:+--no-index --find-links "$WHEELS"} ${packages[$server]}
done
