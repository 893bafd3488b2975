#!/bin/sh
# Makes the secrets that compose.yaml names, as far as they are not there: two random ones, and a place for your own, which
# is written whenever HF_TOKEN says it.
#
# usage: deploy/compose/secrets.sh [FOLDER]
#
# Containers read these files as users that this machine does not know, so the files are open and the folder is not.
set -eu

folder=${1:-$(dirname "$0")/secrets}
mkdir -p "$folder"
chmod 0700 "$folder"

random() {
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

make() {
    [ -e "$folder/$1" ] || write "$1" "$2"
}

write() {
    [ ! -e "$folder/$1" ] || chmod 0644 "$folder/$1"
    printf '%s' "$2" >"$folder/$1"
    chmod 0644 "$folder/$1"
    echo "$folder/$1"
}

make engine_key "$(random)"
make grafana_password "$(random)"
# Of the Hugging Face hub, whose Llama models ask for one; empty for a model from a folder.
if [ -n "${HF_TOKEN:-}" ]; then
    write hf_token "$HF_TOKEN"
else
    make hf_token ""
fi
