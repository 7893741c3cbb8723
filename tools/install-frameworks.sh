#!/bin/sh
# Installs CPU builds of the ML frameworks: PyTorch from a local wheel folder where pip knows one,
# else from PyTorch's own CPU index, because PyPI's Linux build brings several GB of CUDA.
set -eu
python=$1
pip="$python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt"

if ! "$python" -c 'import torch' 2>/dev/null; then
    if [ "${TORCH:-}" = cuda ] || [ "$(uname)" != Linux ]; then
        $pip torch==2.13.0
    elif ! $pip --no-index --no-deps torch==2.13.0 2>/dev/null; then
        $pip --retries 0 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu \
            --no-deps "torch==2.13.0+cpu" || {
            echo "no CPU build of PyTorch can be reached; TORCH=cuda takes PyPI's build" >&2
            exit 1
        }
    fi
fi
$pip -e '.[torch,tensorflow,sklearn]'
