#!/bin/sh
# Everything that is to be measured on one GPU; `python -m experiments.gpu --help` says what and how.
# sh experiments/gpu.sh [--weights FOLDER] [--data FOLDER] [--dry] [PART ...]
set -e
cd "$(dirname "$0")/.."
exec python -m experiments.gpu "$@"
