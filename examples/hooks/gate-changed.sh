#!/bin/sh
# gate-changed.sh [--policy FILE] [--key FILE] FILE…: gate every artifact that one of the files lies in.
#
# The hook of .pre-commit-hooks.yaml, and of any other tool that names changed files. Weights that lie in no artifact
# are refused; other files outside an artifact are none of its business.
set -u
policy= key=
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
for file in "$@"; do
    target= folder=$(dirname -- "$file")
    while :; do # the outermost: a dense copy inside an artifact has a receipt of its own
        [ -e "$folder/bshub-report.json" ] && target=$folder
        case $folder in . | /) break ;; esac
        folder=$(dirname -- "$folder")
    done
    if [ -z "$target" ]; then
        case $file in
            *.safetensors | *.onnx | *.pth | *.pt | *.bin) target=$file ;;
            *) continue ;;
        esac
    fi
    case $seen in *"$newline$target$newline"*) continue ;; esac
    seen=$seen$target$newline
    bshub gate "$target" ${policy:+--policy "$policy"} ${key:+--key "$key"} --quiet || worst=$?
done
exit "$worst"
