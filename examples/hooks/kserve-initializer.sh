#!/bin/sh
# kserve-initializer.sh URI DIR: entry point of a KServe storage initializer that gates what it has downloaded.
#
# KServe runs it as an init container (kserve.yaml beside this file). A code other than 0 keeps the pod from starting,
# and nothing is left behind in the volume that another container could serve.
#   BSHUB_DOWNLOAD  command that is given URI and DIR [/storage-initializer/scripts/initializer-entrypoint]
#   BSHUB_POLICY    policy file, from a ConfigMap; BSHUB_KEY: the signer's public key
set -u
uri=$1 place=$2
${BSHUB_DOWNLOAD:-/storage-initializer/scripts/initializer-entrypoint} "$uri" "$place" || {
    code=$?
    echo "initializer: $uri could not be fetched (exit code $code)" >&2
    exit "$code"
}
code=0
bshub gate "$place" ${BSHUB_POLICY:+--policy "$BSHUB_POLICY"} ${BSHUB_KEY:+--key "$BSHUB_KEY"} --quiet || code=$?
if [ "$code" -ne 0 ]; then
    find "$place" -mindepth 1 -delete
    echo "initializer: $uri was refused (exit code $code) and removed; the arrows above say what to do next" >&2
fi
exit "$code"
