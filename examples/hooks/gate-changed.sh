#!/bin/sh
# gate-changed.sh [--policy FILE] [--key FILE] FILE…: gate every artifact that one of the files lies in.
#
# The hook of .pre-commit-hooks.yaml, and of any other tool that names changed files. Weights that lie in no artifact
# are refused; other files outside an artifact are none of its business. pre-commit does not name files that a push
# deletes: they are asked of git, since a model that lost its receipt must not slip through.
set -u
policy='' key=''
while [ $# -gt 0 ]; do
    case $1 in
        --policy) policy=$2; shift 2 ;;
        --key) key=$2; shift 2 ;;
        --) shift; break ;;
        *) break ;;
    esac
done

newline='
'
worst=0 seen=$newline

look() { # FILE: gate the artifact around it
    target='' folder=$(dirname -- "$1")
    while :; do # the outermost: a dense copy inside an artifact has a receipt of its own
        [ -e "$folder/bshub-report.json" ] && target=$folder
        case $folder in . | /) break ;; esac
        folder=$(dirname -- "$folder")
    done
    if [ -z "$target" ]; then
        case $1 in
            bshub-report.json | */bshub-report.json) # deleted: what is left of the model is no artifact any more
                target=$(dirname -- "$1")
                [ -d "$target" ] || return 0 ;;
            *.safetensors | *.onnx | *.pth | *.pt | *.bin)
                target=$1
                [ -e "$target" ] || return 0 ;;
            *) return 0 ;;
        esac
    fi
    case $seen in *"$newline$target$newline"*) return 0 ;; esac
    seen=$seen$target$newline
    bshub gate "$target" ${policy:+--policy "$policy"} ${key:+--key "$key"} --quiet || worst=$?
}

for file in "$@"; do look "$file"; done
if [ -n "${PRE_COMMIT_FROM_REF:-}" ] && [ -n "${PRE_COMMIT_TO_REF:-}" ]; then
    gone=$(git -c core.quotePath=false diff --name-only --no-renames --diff-filter=D \
        "$PRE_COMMIT_FROM_REF" "$PRE_COMMIT_TO_REF" --) || exit 2
    set -f
    IFS=$newline
    for file in $gone; do look "$file"; done
fi
if [ "$worst" -ne 0 ]; then
    echo "gate: not let through (exit code $worst); the lines above say what to do next." >&2
fi
exit "$worst"
