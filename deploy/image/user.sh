#!/bin/sh
# Makes the user that a container runs as, and the home that it may write to, and nothing else.
#
# usage: user.sh ROOT UID HOME
#
# ROOT is / in an image. The uid is a number that the owner of a volume can be given, whatever its name is there.
set -eu

root=${1%/}
uid=$2
home=$3

if ! grep -q "^[^:]*:[^:]*:$uid:" "$root/etc/passwd"; then
    echo "assay:x:$uid:$uid:Assay:$home:/usr/sbin/nologin" >>"$root/etc/passwd"
    echo "assay:x:$uid:" >>"$root/etc/group"
fi
# What tools keep of what they fetch and compile has a folder from the start: an empty volume is given its owner.
mkdir -p "$root$home/.cache"
chown "$uid:$uid" "$root$home" "$root$home/.cache"
chmod 0750 "$root$home"
