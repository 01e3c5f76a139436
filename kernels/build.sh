#!/usr/bin/env bash
# Compiles cpu.cpp for this CPU where the user's cache does not have it yet, and prints where the shared library lies.
#
#   kernels/build.sh SCRATCH [--again] [flags of the compiler]
#
# A kept library's name says its source, compiler, flags and CPU, because several hosts may share a home. Two processes
# that start together only do the work twice. SCRATCH is a folder of the caller's, for a library that cannot be kept;
# with --again the one that was kept does not load, and the new one lies there as well.
set -euo pipefail
source=$(dirname "$0")/cpu.cpp
compiler=${CXX:-g++} # a command line, as for make: "ccache g++"
scratch=$1
shift
again=""
if [[ ${1:-} == --again ]]; then
    again=yes
    shift
fi
flags=(-std=c++20 -O3 -march=native -fopenmp -pthread -shared -fPIC -w "$@")
features=$(grep -m1 -E '^(flags|Features)' /proc/cpuinfo || true)
key=$({ cat "$source" && echo "$compiler ${flags[*]} $features"; } | sha256sum | cut -c-24)
folder=${XDG_CACHE_HOME:-${HOME:-/dev/null}/.cache}/llama_cpu_kernels
kept=$folder/cpu-$key.so
said=$scratch/said

if [[ -n $again ]]; then
    echo "CPU kernels built again: $kept does not load" >&2
elif [[ -s $kept ]]; then
    echo "$kept"
    exit
fi
if ! bash -c "$compiler \"\$@\"" - "${flags[@]}" "$source" -o "$scratch/cpu.so" 2> "$said"; then
    reason=$(tail -n1 "$said")
    slower="no CPU kernels, so decoding is several times slower"
    echo "$slower: $compiler: ${reason##*line 1: }: CXX names a C++ compiler, GCC 11 or later" >&2
    exit 1
fi
library=$scratch/cpu.so
if ! { mkdir -p -m700 "$folder" && made=$(mktemp "$folder/.cpu.XXXXXX") && cp "$library" "$made" &&
    mv "$made" "$kept"; } 2> "$said"; then
    echo "CPU kernels built for this run only: $folder: $(tail -n1 "$said"): set XDG_CACHE_HOME to a folder" >&2
elif [[ -z $again ]]; then
    library=$kept
fi
echo "$library"
