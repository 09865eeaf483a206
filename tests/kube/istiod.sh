#!/usr/bin/env bash
# istiod.sh OUT
# Builds OUT/istiod, Istio's control plane, from Go modules (istio/go.mod has the versions): a second CA for tests. Needs
# Go. OUT is complete or absent: a second call with the same inputs exits at once. OUT.work holds the caches meanwhile.
set -euo pipefail

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
out=$(realpath -m "${1:?usage: istiod.sh OUT}")
work=$out.work
start=$SECONDS

say() { echo "[$((SECONDS - start))s] $*" >&2; }

key=$(cd "$here" && { cat istiod.sh istio/go.mod istio/go.sum istio/*.go && go version; } | sha256sum | cut -c1-16)
mkdir -p "$(dirname "$out")"
exec 9>"$out.lock"
flock 9
if [ "$(cat "$out/key" 2>/dev/null)" = "$key" ]; then
    say "$out is complete"
    exit 0
fi
mkdir -p "$work"
rm -rf "$work/new"
cd "$here/istio"
export GOMODCACHE=$work/gomod GOCACHE=$work/gocache GOFLAGS=-modcacherw CGO_ENABLED=0
go list -deps . >"$work/build.log" 2>&1 || { tail -20 "$work/build.log" >&2; exit 1; }
say "modules downloaded"
# Debugging information is not even compiled, which saves time.
n=0
go build -v -buildvcs=false -trimpath -gcflags=all=-dwarf=false -ldflags="-s -w" -o "$work/new/istiod" . 2>&1 |
    tee -a "$work/build.log" | while read -r _; do
    n=$((n + 1))
    ((n % 250)) || say "  $n packages"
done || { tail -20 "$work/build.log" >&2; exit 1; }
echo "$key" >"$work/new/key"
rm -rf "$out"
mv "$work/new" "$out"
rm -rf "$work"
say "$out is complete, istio.io/istio $(sed -n 's/.*istio.io\/istio //p' go.mod)"
