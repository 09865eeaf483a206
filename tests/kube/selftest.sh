#!/usr/bin/env bash
# selftest.sh: brings up two nodes, checks what README.md promises, a line each, and tears down.
# Exits 1 if a check failed. BIN, DUAL and PROXY_MODE as for rig.sh.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
export P=${P:-krtest} DUAL=${DUAL:-}
export RUN=${RUN:-${TMPDIR:-/tmp}/kube-rig-$P}
failed=0 scratch=$(mktemp -d)
trap '"$here/rig.sh" down; rm -rf "$scratch"' EXIT

rig() { "$here/rig.sh" "$@"; }
kubectl() { rig kubectl -n t "$@"; }
check() { # WHAT COMMAND...
    local what=$1 output
    shift
    if output=$("$@" 2>&1 </dev/null); then
        echo "✓ $what"
    else
        echo "✗ $what"
        printf '    %s\n' "$*" "$output"
        failed=1
    fi
}
eventually() { # COMMAND...: within 20 s
    local end=$((SECONDS + 20))
    until "$@"; do ((SECONDS < end)) || return 1; sleep 0.2; done
}
not() { ! "$@"; }
pod() { kubectl get pod -l "app=$1" --field-selector "spec.nodeName=n$2,status.phase=Running" -o 'jsonpath={.items[0].metadata.name}'; }
on() { # APP NODE COMMAND: in that node's pod of the DaemonSet
    local name
    name=$(pod "$1" "$2"); shift 2
    kubectl exec -i "$name" -- "$@"
}
ip_of() { kubectl get pod "$(pod web "$1")" -o "jsonpath={.status.podIPs[${2:-0}].ip}"; }
wget=(timeout 3 wget -q -O -) # wget -T crashes in Debian's static busybox
fetch() { on web "$1" "${wget[@]}" "$2"; } # FROM_NODE URL
says() { [ "$(fetch "$1" "$2")" = "$3" ]; }
rollout() { kubectl rollout status daemonset/"$1" --timeout=60s; }
# What the rig must leave alone.
machine() {
    ip -o link; ip -o addr; ip route; ip -6 route; "$BIN/bin/nft" list ruleset
    sysctl vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys net.ipv4.ip_forward
    ls /var/lib /etc /opt
    awk '{print $2}' /proc/mounts | grep -v /run/netns
}

both_answer() { [ "$(for _ in $(seq 24); do echo "$1"; done | on web 1 xargs -n1 "${wget[@]}" | sort -u | xargs)" = "n1 n2" ]; }
host_port() { [ "$(rig cp busybox "${wget[@]}" http://172.30.0.12:18080)" = n2 ]; }
token_review() { # AUDIENCE
    kubectl create -o 'jsonpath={.status.authenticated} {.status.user.username} {.status.user.extra.authentication\.kubernetes\.io/node-name}' -f - <<JSON
{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
 "spec": {"audiences": ["$1"], "token": "$(on web 1 cat /var/run/secrets/mesh/token)"}}
JSON
}
token_names_node() { [ "$(token_review mesh-ca)" = 'true system:serviceaccount:t:web ["n1"]' ]; }
wrong_audience() { [[ "$(token_review other)" != true* ]]; }
agents_are_apart() {
    [ "$(rig node 1 cat /run/agent-was-here)" = n1 ] && [ "$(rig node 2 cat /run/agent-was-here)" = n2 ]
}
bpffs() { on agent 1 mkdir /sys/fs/bpf/probe && rig node 1 test -d /sys/fs/bpf/probe && ! rig node 2 test -d /sys/fs/bpf/probe; }
propagation() {
    on agent 1 sh -c 'mkdir /host/run/probe && mount -t tmpfs tmpfs /host/run/probe' &&
        rig node 1 mountpoint -q /run/probe && ! rig node 2 test -d /run/probe
}
chain_plugin() {
    on agent 1 sh -c 'cat >/host/cni-bin/probe && chmod +x /host/cni-bin/probe' && on agent 1 sh -c \
        'cd /host/cni-conf && sed "\$s/]}\$/,{\"type\":\"probe\"}]}/" 10-rig.conflist >new && mv new 10-rig.conflist'
} <<'PLUGIN'
#!/bin/sh
case $CNI_COMMAND in
    VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
    ADD) echo "$CNI_ARGS $CNI_NETNS" >>/run/cni-probe; sed 's/.*"prevResult":\(.*\),"type":.*/\1/' ;;
esac
PLUGIN
plugin_ran() {
    kubectl delete pod -l app=web --wait && eventually rollout web && rig node 1 grep -w "K8S_POD_NAME=$(pod web 1)" /run/cni-probe &&
        ! rig node 2 test -e /run/cni-probe
}
pods_in_v2() { on agent 1 sh -c "grep -q '^0::/kubepods/' /proc/self/cgroup && test -e /host/cgroup/unified/kubepods/cgroup.procs"; }
import() {
    cc -static -O2 -o "$scratch/deny" "$here/test/deny.c" &&
        "$here/mkimg.py" "$scratch/deny.tar" rig.local/deny:1 "$scratch/deny=/deny" --entrypoint '["/deny"]' &&
        rig import "$scratch/deny.tar" && kubectl apply -f "$here/test/deny.yaml" &&
        kubectl wait --for=condition=Ready pod/deny --timeout=20s
}
denied_on_1_only() { eventually logs_say deny attached && ! fetch 1 "http://$(ip_of 2):8080" && says 2 "http://$(ip_of 1):8080" n1; }
logs_say() { [ "$(kubectl logs "$1")" = "$2" ]; }
denial_ends() { kubectl delete pod deny --now && says 1 "http://$(ip_of 2):8080" n2; }
helm_install() {
    mkdir -p "$scratch/chart/templates"
    printf 'apiVersion: v2\nname: chart\nversion: 0.1.0\n' >"$scratch/chart/Chart.yaml"
    printf 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: "{{ .Release.Name }}"}\n' >"$scratch/chart/templates/map.yaml"
    rig cp helm install -n t probe "$scratch/chart" && kubectl get configmap probe
}
restarts() { kubectl get pod -l app=web --field-selector spec.nodeName=n2 -o 'jsonpath={.items[0].status.containerStatuses[0].restartCount}'; }
restarted() { [ "$(restarts)" = 1 ] && rollout web && says 1 "http://$(ip_of 2):8080" n2; }
power_cut() { rig node-down 2 && ! rig node 2 true && rig node-up 2 && eventually restarted; }
survives_apiserver() {
    rig stop kube-apiserver && ! kubectl get nodes --request-timeout=2s && says_now && rig start kube-apiserver && kubectl get nodes
}
survives_etcd() { rig stop etcd && says_now && rig start etcd && eventually kubectl create configmap after-etcd; }
survives_kubelet() { rig stop kubelet-n2 && says_now && rig start kubelet-n2 && eventually kubectl logs "$(pod web 2)"; }
# Without the API server nobody can exec: what the node's own containers say is asked on the node.
says_now() { [ "$(rig cp busybox "${wget[@]}" http://172.30.0.11:30080)" != "" ]; }
nothing_left() {
    ! ip netns list | grep -E "^$P(cp|n[0-9])" && ! ls -d /sys/fs/cgroup/*/"$P"n* 2>/dev/null && [ ! -e "$RUN" ] && ! pgrep -f "$RUN/"
}
machine_unchanged() { machine | diff "$scratch/machine" -; }

machine >"$scratch/machine"
rig up 2
kubectl apply -f "$here/test/workloads.yaml" >/dev/null
rollout web >/dev/null
rollout agent >/dev/null
echo "$(kubectl get nodes -o 'jsonpath={range .items[*]}{.metadata.name} {.status.nodeInfo.kubeletVersion} {.status.nodeInfo.containerRuntimeVersion}; {end}')after $SECONDS s"
check "a pod reaches a pod of the other node" says 1 "http://$(ip_of 2):8080" n2
check "a Service balances over both nodes" eventually both_answer "http://$(kubectl get svc web -o 'jsonpath={.spec.clusterIP}')"
check "a NodePort answers on each node" rig cp busybox "${wget[@]}" http://172.30.0.11:30080 http://172.30.0.12:30080
check "a hostPort leads to the node's own pod" host_port
check "DNS resolves a Service in a pod" both_answer http://web.t.svc.cluster.local
check "a pod reaches the API server's Service" on web 1 timeout 3 nc kubernetes.default 443
check "kubectl logs" logs_say "$(pod web 1)" serving
check "TokenReview accepts a projected token and names its node" token_names_node
check "TokenReview refuses another audience" wrong_audience
check "a hostNetwork pod has the node's address" on agent 1 sh -c 'ip addr show eth0 | grep -q 172.30.0.11/24'
check "a hostPID pod sees the kubelet of its node, alone" on agent 1 sh -c '[ "$(pidof kubelet | wc -w)" = 1 ]'
check "a hostPath is the node's own" agents_are_apart
check "/sys/fs/bpf is shared by a node and its pods, not by nodes" bpffs
check "a mount made in a Bidirectional hostPath appears on the node" propagation
check "pods are in the cgroup v2 hierarchy, which a privileged pod sees" pods_in_v2
check "a pod adds a CNI plugin to the chain" chain_plugin
check "the next pod of that node runs it, other nodes do not" plugin_ran
check "import, and a pod from the imported image" import
check "cgroup/connect4 attached by a pod of n1 stops n1's pods, not n2's" denied_on_1_only
check "its link ends with the pod" denial_ends
check "helm installs a chart" helm_install
if [ -n "$DUAL" ]; then
    check "IPv6: a pod reaches a pod of the other node" says 1 "http://[$(ip_of 2 1)]:8080" n2
    check "IPv6: a Service balances over both nodes" eventually both_answer "http://[$(kubectl get svc web -o 'jsonpath={.spec.clusterIPs[1]}')]"
fi
check "the API server stops and starts, and pods go on" survives_apiserver
check "etcd stops and starts, and pods go on" survives_etcd
check "a kubelet stops and starts, and pods go on" survives_kubelet
check "a node comes back after a power cut" power_cut
check "up ends what was still up" rig up 0
check "down" rig down
check "nothing is left" nothing_left
check "the machine's network, sysctls, files and mounts are as before" machine_unchanged
echo "$([ $failed = 0 ] && echo passed || echo FAILED) in $SECONDS s"
exit $failed
