#!/usr/bin/env bash
# rig.sh: a real Kubernetes in network namespaces of this machine. Needs root.
#   up [N]             control plane, N nodes (default 2) and DNS; up 0 is the API server alone
#   down               ends all of it, also what a crash left behind
#   node-up I          adds node nI, or starts it again after node-down
#   node-down I        kills node nI and all its pods at once, as a power cut does
#   stop NAME          kills one component at once: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, or
#                      kubelet-nI, containerd-nI, kube-proxy-nI; pods go on; or istiod
#   start NAME         starts it again; istiod (the program that ISTIOD names) for the first time as well: for its CA alone,
#                      which is what lies in RUN/istiod/etc/cacerts, or one that it makes
#   kubectl ARGS       kubectl as cluster-admin
#   cp COMMAND         runs COMMAND in the control plane's network namespace, with KUBECONFIG set
#   node I COMMAND     runs COMMAND on node nI: its namespaces, its cgroup
#   alone DEFINITIONS COMMAND   up 0, without controllers and with these definitions, for as long as COMMAND runs in the
#                      control plane's network namespace; down with its end, or a Ctrl-C
#   import IMAGE.tar   loads an OCI or docker archive into all nodes, and into nodes that come later
#   logs [NAME]        the logs of the components: their names, or one of them
# Environment: BIN  what build.sh made        RUN  state (default $TMPDIR/kube-rig-$P)
#   P  prefix of namespaces and cgroups (default kr), one per rig      DUAL=1  IPv4 and IPv6
#   NO_KUBE_PROXY=1   NO_DNS=1   PROXY_MODE=nftables|iptables   APISERVER_ARGS, KCM_ARGS  more flags
#   KUBELET_CONFIG  more lines of KubeletConfiguration
set -euo pipefail
shopt -s extglob

usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
[ $# -gt 0 ] || usage

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
export P=${P:-kr} DUAL=${DUAL:-} NO_KUBE_PROXY=${NO_KUBE_PROXY:-} NO_DNS=${NO_DNS:-} KUBELET_CONFIG=${KUBELET_CONFIG:-}
export PROXY_MODE=${PROXY_MODE:-nftables}
BIN=$(realpath "${BIN:?set it to the directory that build.sh made}")
RUN=$(realpath -m "${RUN:-${TMPDIR:-/tmp}/kube-rig-$P}")
export BIN RUN pki=$RUN/pki
export PATH=$BIN/bin:$PATH KUBECONFIG=$pki/admin.kubeconfig
# shellcheck source=/dev/null # A later node-up must see what up was told.
[ "$1" = up ] || [ ! -e "$RUN/settings" ] || . "$RUN/settings"
[[ $P =~ ^[a-z][a-z0-9]{0,7}$ ]] || { echo "rig.sh: P=$P: must be 1 to 8 lower-case letters and digits, a letter first" >&2; exit 2; }
for d in "$BIN" "$RUN" "$here"; do
    case $d/ in /run/* | /etc/* | /opt/* | /var/lib/* | /var/log/*)
        echo "rig.sh: $d: must lie elsewhere, as each node mounts its own /run, /etc, /opt, /var/lib and /var/log" >&2
        exit 2 ;;
    esac
done

# Every rig has the same addresses: they exist in its own namespaces only.
export api=172.30.0.1 service_net=10.96.0.0/16 dns=10.96.0.10 pod_net=10.244.0.0/16
if [ -n "$DUAL" ]; then service_net+=,fd00:96::/112 pod_net+=,fd00:244::/48; fi
node_ips() { echo "172.30.0.$((10 + $1))${DUAL:+,fd00:30::$((10 + $1))}"; }
pod_nets() { echo "10.244.$1.0/24${DUAL:+,fd00:244:0:$1::/64}"; }

# The controllers that this kind of machine mounts one by one (cgroup v1), and the v2 hierarchy beside them.
controllers="cpu cpuacct cpuset memory devices freezer blkio pids systemd unified"

say() { echo "rig.sh: $*" >&2; }
in_ns() { local ns=$1; shift; nsenter --net="/run/netns/$P$ns" "$@"; }
wait_for() { # SECONDS COMMAND
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || { say "gave up waiting for: $*"; return 1; }
        sleep 0.1
    done
}
# Names of the nodes whose namespaces exist, as n1 n2.
nodes() { ip netns list | awk '{print $1}' | sed -nE "s/^$P(n[0-9]+)$/\1/p"; }
daemon() { # NAME COMMAND: outlives this script, logs to a file
    local name=$1; shift
    setsid "$@" >>"$RUN/log/$name" 2>&1 </dev/null &
}

control_plane() { # NAME COMMAND: has one share of the CPU with the others of its kind, as if it had a machine of its own
    local name=$1; shift
    (
        mkdir -p "/sys/fs/cgroup/cpu/${P}cp"
        echo "$BASHPID" >"/sys/fs/cgroup/cpu/${P}cp/cgroup.procs"
        daemon "$name" nsenter --net="/run/netns/${P}cp" "$@"
    )
}

certificate() { # NAME SUBJECT [ALTERNATIVE_NAMES]
    local more=(-addext extendedKeyUsage=clientAuth,serverAuth)
    [ -z "${3:-}" ] || more+=(-addext "subjectAltName=$3")
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -CA "$pki/ca.crt" -CAkey "$pki/ca.key" \
        -subj "$2" -addext basicConstraints=CA:FALSE "${more[@]}" -keyout "$pki/$1.key" -out "$pki/$1.crt" 2>/dev/null
}
client() { # NAME SUBJECT: a certificate and a kubeconfig with it
    certificate "$1" "$2"
    cat >"$pki/$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: rig, cluster: {server: "https://$api:6443", certificate-authority: "$pki/ca.crt"}}]
users: [{name: $1, user: {client-certificate: "$pki/$1.crt", client-key: "$pki/$1.key"}}]
contexts: [{name: rig, context: {cluster: rig, user: $1}}]
current-context: rig
YAML
}
make_pki() {
    mkdir -p "$pki"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -subj /CN=rig-ca \
        -keyout "$pki/ca.key" -out "$pki/ca.crt" 2>/dev/null
    openssl genpkey -algorithm RSA -out "$pki/sa.key" 2>/dev/null
    openssl pkey -in "$pki/sa.key" -pubout -out "$pki/sa.pub"
    local name names=DNS:localhost,IP:127.0.0.1,IP:$api,IP:10.96.0.1${DUAL:+,IP:fd00:96::1}
    for name in kubernetes kubernetes.default kubernetes.default.svc kubernetes.default.svc.cluster.local; do
        names+=,DNS:$name
    done
    certificate apiserver /CN=kube-apiserver "$names"
    certificate apiserver-kubelet /O=system:masters/CN=kube-apiserver-kubelet
    certificate front-proxy /CN=front-proxy
    client admin /O=system:masters/CN=admin
    for name in kube-controller-manager kube-scheduler kube-proxy; do client $name /CN=system:$name; done
}

make_namespace() { # NAME
    ip netns add "$P$1"
    ip -n "$P$1" link set lo up
    in_ns "$1" sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
}
control_plane_network() {
    make_namespace cp
    ip -n "${P}cp" link add br0 type bridge
    ip -n "${P}cp" link set br0 up
    ip -n "${P}cp" addr add $api/24 dev br0
    ip -n "${P}cp" addr add fd00:30::1/64 dev br0 nodad
}
route() { # NS NODE: the way to NODE's pods
    local nets ips family
    IFS=, read -ra nets <<<"$(pod_nets "${2#n}")"
    IFS=, read -ra ips <<<"$(node_ips "${2#n}")"
    for family in "${!nets[@]}"; do ip -n "$P$1" route replace "${nets[family]}" via "${ips[family]}"; done
}
node_network() { # I
    local other ns=${P}n$1 ip
    make_namespace "n$1"
    # The same address after a power cut: the neighbours remember it.
    ip link add eth0 netns "$ns" address "$(printf '02:00:00:00:00:%02x' "$1")" type veth peer name "n$1" netns "${P}cp"
    ip -n "${P}cp" link set "n$1" master br0 up
    ip -n "$ns" link set eth0 up
    for ip in $(node_ips "$1" | tr , ' '); do
        case $ip in *:*) ip -n "$ns" addr add "$ip/64" dev eth0 nodad ;; *) ip -n "$ns" addr add "$ip/24" dev eth0 ;; esac
    done
    ip -n "$ns" route add default via $api
    [ -z "$DUAL" ] || ip -n "$ns" route add default via fd00:30::1
    route cp "n$1"
    for other in $(nodes); do
        [ "$other" = "n$1" ] || { route "$other" "n$1"; route "n$1" "$other"; }
    done
}

etcd() {
    control_plane etcd etcd --data-dir "$RUN/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
}
apiserver() {
    # shellcheck disable=SC2086 # APISERVER_ARGS is a list
    control_plane kube-apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
        --advertise-address=$api --secure-port=6443 --cert-dir="$RUN/apiserver" --allow-privileged=true \
        --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
        --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --service-cluster-ip-range=$service_net \
        --service-account-issuer=https://kubernetes.default.svc.cluster.local \
        --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key" \
        --kubelet-client-certificate="$pki/apiserver-kubelet.crt" --kubelet-client-key="$pki/apiserver-kubelet.key" \
        --kubelet-certificate-authority="$pki/ca.crt" --kubelet-preferred-address-types=InternalIP \
        --requestheader-client-ca-file="$pki/ca.crt" --requestheader-allowed-names=front-proxy \
        --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
        --requestheader-extra-headers-prefix=X-Remote-Extra- \
        --proxy-client-cert-file="$pki/front-proxy.crt" --proxy-client-key-file="$pki/front-proxy.key" ${APISERVER_ARGS:-}
}
controller() { # kube-controller-manager or kube-scheduler
    local name=$1
    local args=(--kubeconfig="$pki/$name.kubeconfig" --authentication-kubeconfig="$pki/$name.kubeconfig"
        --authorization-kubeconfig="$pki/$name.kubeconfig" --leader-elect=false --bind-address=127.0.0.1 --cert-dir="$RUN/$name")
    # shellcheck disable=SC2206 # KCM_ARGS is a list
    [ "$name" = kube-scheduler ] || args+=(--use-service-account-credentials=true --service-account-private-key-file="$pki/sa.key"
        --root-ca-file="$pki/ca.crt" --cluster-signing-cert-file="$pki/ca.crt" --cluster-signing-key-file="$pki/ca.key"
        --service-cluster-ip-range=$service_net --kube-api-qps=1000 --kube-api-burst=1000 ${KCM_ARGS:-}) # the default of 20 costs 4 s
    control_plane "$name" "$name" "${args[@]}"
}

istiod() { # its relative paths begin in a folder of its own
    mkdir -p "$RUN/istiod"
    kubectl create namespace istio-system --dry-run=client -o yaml | kubectl apply -f - >/dev/null
    (
        cd "$RUN/istiod"
        export POD_NAME=istiod-0 POD_NAMESPACE=istio-system CA_TRUSTED_NODE_ACCOUNTS=warren-system/warren-node
        daemon istiod nsenter --net="/run/netns/${P}cp" "${ISTIOD:?set it to the program}" discovery --kubeconfig "$pki/admin.kubeconfig" \
            --secureGRPCAddr=0.0.0.0:15012 --grpcAddr= --httpAddr=127.0.0.1:15580 --httpsAddr=127.0.0.1:15517 \
            --monitoringAddr=127.0.0.1:15514 --ctrlz_port=0 --log_output_level=default:info,serverca:debug
    )
}

join_cgroups() { # I: this shell and what it starts belong to node I
    local c
    for c in $controllers; do echo $BASHPID >"/sys/fs/cgroup/$c/${P}n$1/cgroup.procs"; done
}
node_settings() { # I: what node.sh needs to know
    node_ips=$(node_ips "$1") pod_nets=$(pod_nets "$1")
    export controllers node_ips pod_nets
}
start_node() { # I
    local c i=$1
    node_network "$i"
    mkdir -p "$RUN/n$i"
    rm -f "$RUN/n$i/pid"
    [ -e "$pki/n$i.kubeconfig" ] || client "n$i" "/O=system:nodes/CN=system:node:n$i"
    certificate "n$i-serve" "/CN=n$i" "DNS:n$i$(for a in $(node_ips "$i" | tr , ' '); do printf ',IP:%s' "$a"; done)"
    for c in $controllers; do mkdir -p "/sys/fs/cgroup/$c/${P}n$i"; done
    for c in cpus mems; do cat "/sys/fs/cgroup/cpuset/cpuset.$c" >"/sys/fs/cgroup/cpuset/${P}n$i/cpuset.$c"; done
    node_settings "$i"
    (
        join_cgroups "$i"
        daemon "node-n$i" nsenter --net="/run/netns/${P}n$i" unshare --mount --uts --ipc --cgroup --pid --fork --kill-child \
            "$here/node.sh" "$i"
    )
}
# The Node object comes first because a kubelet cannot set podCIDRs; it adopts the object and completes it.
register_node() { # I
    local nets; nets=$(pod_nets "$1")
    kubectl apply -f - >/dev/null <<YAML
{apiVersion: v1, kind: Node, metadata: {name: n$1, labels: {topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: z$1}},
 spec: {podCIDR: "${nets%%,*}", podCIDRs: ["${nets//,/\", \"}"]}}
YAML
}
kill_namespace() { # NAME: ends its processes, a node's pods with them, and removes it
    local pids
    while pids=$(ip netns pids "$P$1") && [ -n "$pids" ]; do
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null || true
        sleep 0.05
    done
    ip netns del "$P$1"
    remove_cgroups "$P$1"
}
remove_cgroups() { # PATTERN: with what a test that was killed has left in its pods
    local c d
    for c in $controllers; do
        for d in /sys/fs/cgroup/"$c"/$1; do
            [ ! -d "$d" ] || wait_for 10 remove_cgroup "$d"
        done
    done
}
remove_cgroup() { # processes that were killed may need a moment to leave
    find "$1" -name cgroup.procs -exec cat {} + | xargs -r kill -KILL || true
    find "$1" -depth -type d -exec rmdir {} +
}

kubectl() { in_ns cp kubectl "$@"; }
lease() { kubectl -n kube-node-lease get lease "n$1" -o 'jsonpath={.spec.renewTime}' 2>/dev/null; }
lease_is_newer() { [[ "$(lease "$1")" > "$2" ]]; }
is_ready() { [ "$(kubectl get node "n$1" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
# Nodes whose disk fills up while they run take no pods, and no test says why.
has_room() {
    local wanted=2048 there
    there=$(df --output=avail -B1M "$RUN" | tail -n 1)
    ((there >= wanted)) || {
        say "$RUN: the nodes need $wanted MB there, and $((there)) MB are free: make room, or set RUN (TMPDIR) to a larger disk"
        rm -rf "$RUN"
        return 1
    }
}
up() {
    local i n=${1:-2}
    down
    mkdir -p "$RUN/log" "$RUN/img"
    [ "$n" = 0 ] || has_room
    declare -p DUAL NO_KUBE_PROXY NO_DNS KUBELET_CONFIG PROXY_MODE >"$RUN/settings"
    make_pki
    control_plane_network
    etcd
    apiserver
    for i in $(seq "$n"); do start_node "$i"; done
    wait_for 300 kubectl get --raw /readyz || { tail -5 "$RUN/log/kube-apiserver" >&2; return 1; }
    controller kube-controller-manager
    controller kube-scheduler
    for i in $(seq "$n"); do register_node "$i"; done
    touch "$RUN/ready"
    for i in $(seq "$n"); do wait_for 300 is_ready "$i"; done
    [ "$n" = 0 ] || [ -n "$NO_DNS" ] || {
        kubectl apply -f "$here/dns.yaml" >/dev/null
        kubectl -n kube-system rollout status deployment/coredns --timeout=300s >/dev/null
    }
    say "Kubernetes $(kubectl version -o json | sed -n '/serverVersion/,$s/.*"gitVersion": "\(.*\)".*/\1/p') with $n nodes is up"
}
down() {
    local ns
    for ns in $(nodes) $(ip netns list | grep -o "^${P}cp\b" | sed "s/^$P//"); do kill_namespace "$ns"; done
    remove_cgroups "${P}@(cp|n+([0-9]))"
    rm -rf "$RUN"
}
node_up() {
    local before
    before=$(lease "$1") || true
    start_node "$1"
    register_node "$1"
    wait_for 90 lease_is_newer "$1" "$before" # a dead node is called Ready for 40 s
    wait_for 300 is_ready "$1"
}
on_node() { # I COMMAND
    local pid i=$1; shift
    pid=$(cat "$RUN/n$i/pid" 2>/dev/null) && [ -d "/sys/fs/cgroup/cpu/${P}n$i" ] || { say "node n$i is not up"; return 1; }
    (join_cgroups "$i"; exec nsenter -t "$pid" -m -p -n -u -i -C -- "$@")
}
namespace_of() { case $1 in *-n+([0-9])) echo "${1##*-}" ;; *) echo cp ;; esac; } # COMPONENT
pids_of() { # COMPONENT: by the name that the kernel has of it, at most 15 letters
    local pid name=${1%-n+([0-9])}
    for pid in $(ip netns pids "$P$(namespace_of "$1")"); do
        [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != "${name:0:15}" ] || echo "$pid"
    done
}
stop() { # COMPONENT
    local pids
    pids=$(pids_of "$1")
    [ -n "$pids" ] || { say "$1 does not run"; return 1; }
    while [ -n "$pids" ]; do
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null || true
        sleep 0.05
        pids=$(pids_of "$1")
    done
}
start() { # COMPONENT
    [ -z "$(pids_of "$1")" ] || { say "$1 runs already"; return 1; }
    local i=${1##*-n}
    case $1 in
        etcd) etcd ;;
        kube-apiserver) apiserver ;;
        kube-controller-manager | kube-scheduler) controller "$1" ;;
        istiod) istiod ;;
        kubelet-n* | containerd-n* | kube-proxy-n*) node_settings "$i"; daemon "$1" "$0" node "$i" "$here/node.sh" "$i" "${1%-n*}" ;;
        *) usage ;;
    esac
    case $1 in
        etcd | kube-apiserver) wait_for 300 kubectl get --raw /readyz ;;
        istiod) wait_for 120 in_ns cp bash -c 'exec 3<>/dev/tcp/127.0.0.1/15012' || { tail -5 "$RUN/log/istiod" >&2; return 1; } ;;
    esac
}
import() { # IMAGE.tar
    local n
    cp "$1" "$RUN/img/"
    for n in $(nodes); do on_node "${n#n}" ctr -n k8s.io images import "$RUN/img/$(basename "$1")" >/dev/null; done
}
# An API server without nodes, and nothing beside COMMAND that changes its objects; it goes down with COMMAND, and with us.
alone() { # DEFINITIONS COMMAND
    local definitions=$1; shift
    trap 'trap "" HUP INT TERM; down' EXIT
    trap 'exit 130' HUP INT
    trap 'exit 143' TERM
    up 0
    # They would take nodes without kubelets for dead, and their pods away.
    stop kube-controller-manager
    stop kube-scheduler
    kubectl apply --filename "$definitions" >/dev/null
    in_ns cp "$@"
}
logs() { if [ -n "${1:-}" ]; then cat "$RUN/log/$1"; else ls "$RUN/log"; fi; }

command=$1
shift
case $command in
    up | down | alone | import | logs | kubectl | stop | start) $command "$@" ;;
    cp) in_ns cp "$@" ;;
    node) on_node "$@" ;;
    node-up) node_up "$1" ;;
    node-down) kill_namespace "n$1" ;;
    *) usage ;;
esac
