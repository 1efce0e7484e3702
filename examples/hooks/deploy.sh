#!/bin/sh
# deploy.sh ARTIFACT TARGET [POLICY]: put an artifact where it is served from, if the gate lets it.
#
# What is gated is the copy, not the original: nobody can change it between the look and the move.
set -eu
artifact=$1 target=$2 policy=${3:-}
staged=$(mktemp -d "$(dirname -- "$target")/.deploy.XXXXXX")
trap 'rm -rf -- "$staged"' EXIT
cp -R -- "$artifact" "$staged/new"

code=0
bshub gate "$staged/new" ${policy:+--policy "$policy"} --quiet || code=$?
if [ "$code" -ne 0 ]; then
    echo "deploy: not deployed (exit code $code); $target is as it was. The lines above say what to do next." >&2
    exit "$code"
fi
if [ -e "$target" ]; then mv -- "$target" "$staged/old"; fi
mv -- "$staged/new" "$target"
echo "deploy: $target is now $artifact"
