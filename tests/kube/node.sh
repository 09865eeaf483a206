#!/usr/bin/env bash
# node.sh I: pid 1 of node nI, started by rig.sh in new namespaces. It makes the file systems a node has, then
# runs containerd, the kubelet and kube-proxy; when it dies, all of the node dies.
# node.sh I NAME: becomes one of the three, within the node.
set -euo pipefail
i=$1 dir=$RUN/n$1

component() { # NAME: becomes it
    local c
    # As on a node with systemd: what runs beside the pods has one share of the CPU, however many tasks it has.
    for c in cpu memory; do
        mkdir -p "/sys/fs/cgroup/$c/system"
        echo "$BASHPID" >"/sys/fs/cgroup/$c/system/cgroup.procs"
    done
    case $1 in
        containerd) exec containerd -c "$dir/containerd.toml" ;;
        kubelet) exec kubelet --config="$dir/kubelet.yaml" --kubeconfig="$pki/n$i.kubeconfig" --hostname-override="n$i" --node-ip="$node_ips" ;;
        kube-proxy) exec kube-proxy --kubeconfig="$pki/kube-proxy.kubeconfig" --hostname-override="n$i" \
            --cluster-cidr="$pod_net" --proxy-mode="$PROXY_MODE" --conntrack-max-per-core=0 ;;
    esac
}
[ -z "${2:-}" ] || component "$2"

read -r pid _ </proc/self/stat # as the machine counts, until /proc is mounted anew
hostname "n$i"
mount --make-rprivate /
mount -t proc proc /proc
umount -lR /sys
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for c in $controllers; do
    mkdir "/sys/fs/cgroup/$c"
    case $c in
        systemd) mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd ;;
        unified) mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified ;;
        *) mount -t cgroup -o "$c" cgroup "/sys/fs/cgroup/$c" ;;
    esac
done
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs -o mode=755 tmpfs /run

# A node's own /etc, /opt, /var/lib and /var/log over the machine's: what pods write there stays in the rig.
for d in etc opt var/lib var/log; do
    mkdir -p "$dir/$d" "$dir/overlay/$d"
    mount -t overlay -o "lowerdir=/$d,upperdir=$dir/$d,workdir=$dir/overlay/$d" overlay "/$d"
done
# Images and emptyDirs must not lie on an overlay: it cannot carry another one.
for d in containerd kubelet; do
    mkdir -p "$dir/$d" "/var/lib/$d"
    mount --bind "$dir/$d" "/var/lib/$d"
done
# The kubelet sets these for the whole machine; it finds them set as it wants, and the machine keeps its own.
for s in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=$dir/sysctl/${s%=*}
    mkdir -p "$(dirname "$file")"
    echo "${s#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${s%=*}"
done
mount --make-rshared /

mkdir -p /etc/cni/net.d /opt/cni/bin /run/netns /run/lock
cp -n "$BIN"/cni/* /opt/cni/bin/
ranges= routes=
for net in ${pod_nets//,/ }; do
    ranges+=${ranges:+,}"[{\"subnet\":\"$net\"}]"
    case $net in *:*) routes+=',{"dst":"::/0"}' ;; *) routes+='{"dst":"0.0.0.0/0"}' ;; esac
done
[ -e /etc/cni/net.d/10-rig.conflist ] || cat >/etc/cni/net.d/10-rig.conflist <<JSON
{"cniVersion":"1.0.0","name":"rig","plugins":[
{"type":"ptp","ipam":{"type":"host-local","ranges":[$ranges],"routes":[$routes]}},
{"type":"portmap","capabilities":{"portMappings":true},"backend":"nftables"}]}
JSON
# No CAP_SYS_RESOURCE, no oom_score_adj below zero: containerd must clamp what the kubelet asks for.
cat >"$dir/containerd.toml" <<'TOML'
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = 'rig.local/pause:1'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
TOML
cat >"$dir/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $pki/n$i-serve.crt
tlsPrivateKeyFile: $pki/n$i-serve.key
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
clusterDomain: cluster.local
clusterDNS: [$dns]
resolvConf: ""
evictionHard: {memory.available: 100Mi, nodefs.available: 256Mi, imagefs.available: 256Mi, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
nodeStatusUpdateFrequency: 4s
$KUBELET_CONFIG
YAML

echo "$pid" >"$dir/pid"
component containerd >>"$RUN/log/containerd-n$i" 2>&1 &
until ctr version >/dev/null 2>&1; do sleep 0.1; done
for image in "$BIN"/img/*.tar "$RUN"/img/*.tar; do
    [ ! -e "$image" ] || ctr -n k8s.io images import "$image"
done
until [ -e "$RUN/ready" ]; do sleep 0.1; done
component kubelet >>"$RUN/log/kubelet-n$i" 2>&1 &
[ -n "$NO_KUBE_PROXY" ] || component kube-proxy >>"$RUN/log/kube-proxy-n$i" 2>&1 &
# As pid 1 it must reap what others leave behind.
while true; do wait -n || sleep 1; done
