#!/bin/sh
# Waits until a Job has ended, and ends as it did: with 0 where it is complete, with 1 and its last words where it failed.
# `kubectl wait` waits for one of the two, and for hours where the other has come.
#
#   deploy/kubernetes/ended.sh assay-build      # NAMESPACE=… where it is not `assay`
set -eu
job=$1
namespace=${NAMESPACE:-assay}
while :; do
    conditions=$(kubectl -n "$namespace" get job "$job" -o jsonpath='{.status.conditions[?(@.status=="True")].type}')
    case " $conditions " in
        *" Complete "*) exit 0 ;;
        *" Failed "*)
            kubectl -n "$namespace" logs "job/$job" --tail=20 >&2 || true
            echo "$job has failed." >&2
            exit 1
            ;;
    esac
    sleep "${EVERY_S:-10}"
done
