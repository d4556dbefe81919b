#!/usr/bin/env bash
# NOT RUN HERE: written from Ray's documentation, without a cluster to try it on.
#
# Starts a Ray cluster over ssh, trains on it, and stops it. Run it on the head, in a folder that all hosts share,
# with hybridflow[ray] installed at the same path on each:
#
#   examples/ray/start.sh "host-b host-c" job.yaml run.folder=runs/on-three
#
# job.yaml has the pools, for example: placement: {pools: {all: 24}}
set -euo pipefail
others=$1 config=$2
shift 2
port=6379
head=$(hostname -i | cut -d' ' -f1)
here=$PWD

ray get-auth-token --generate >/dev/null # one token for all hosts, copied below
stop() {
  for host in $others; do ssh "$host" "cd '$here' && ray stop" || true; done
  ray stop
}
trap stop EXIT

ray start --head --node-ip-address="$head" --port="$port" --include-dashboard=false
for host in $others; do
  ssh "$host" 'mkdir -p ~/.ray'
  scp -q ~/.ray/auth_token "$host:.ray/auth_token"
  ssh "$host" "cd '$here' && ray start --address='$head:$port'"
done
hybridflow doctor
hybridflow train "$config" placement.backend=ray placement.address="$head:$port" "$@"
