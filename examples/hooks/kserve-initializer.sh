#!/bin/sh
# kserve-initializer.sh URI DIR [URI DIR]…: entry point of a KServe storage initializer that gates what it downloads.
#
# KServe runs it as an init container (kserve.yaml beside this file). A code other than 0 keeps the pod from starting,
# and nothing is left behind in the volumes that another container could serve.
#   BSHUB_DOWNLOAD  command that is given the same words [/storage-initializer/scripts/initializer-entrypoint]
#   BSHUB_POLICY    policy file; BSHUB_KEY: the signer's public key (kserve.Dockerfile sets both)
set -u
if [ $# -lt 2 ] || [ $(($# % 2)) -ne 0 ]; then
    echo "usage: kserve-initializer.sh URI DIR [URI DIR]…" >&2
    exit 2
fi

empty() { # PAIRS: nothing that was refused, or fetched beside it, is served
    while [ $# -gt 0 ]; do
        if [ -d "$2" ]; then find "$2" -mindepth 1 -delete; fi
        shift 2
    done
}

${BSHUB_DOWNLOAD:-/storage-initializer/scripts/initializer-entrypoint} "$@" || {
    code=$?
    empty "$@"
    echo "initializer: $1 could not be fetched (exit code $code): look at its address and at the credentials" >&2
    exit "$code"
}
check() { # PAIRS
    while [ $# -gt 0 ]; do
        bshub gate "$2" ${BSHUB_POLICY:+--policy "$BSHUB_POLICY"} ${BSHUB_KEY:+--key "$BSHUB_KEY"} --quiet || {
            code=$?
            echo "initializer: $1 was refused (exit code $code) and removed; the lines above say what to do next" >&2
            return "$code"
        }
        shift 2
    done
}
check "$@" || {
    code=$?
    empty "$@"
    exit "$code"
}
