//! What leaves: `sock_ops` decides at connect, `cgroup/connect4|6` prepares it, a classifier guards the way out. Here
//! facts are gathered and verdicts carried out; `warren_common::connect` and `guard` decide.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        bindings::{
            BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
            BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, BPF_TCP_CLOSE, BPF_TCP_LISTEN, TC_ACT_SHOT,
        },
        macros::{cgroup_sock_addr, classifier, sock_ops},
        programs::{SockAddrContext, SockOpsContext, TcContext},
    };
    use aya_log_ebpf::trace;
    use warren_common::{
        Address, Family, FourTuple, PodNumber, Reason,
        connect::{Connect, ConnectFacts, NodeConnectFacts, connect, is_node_connect, sheds_mark},
        guard::{Guard, guard},
        marks,
        tables::{NodeFacts, ServiceEntry, WorkloadEntry},
    };
    use warren_ebpf::{
        context::{Dial, Ops, Socket, packet_mark},
        helpers::{SocketContext, is_below_cgroup, now},
        maps,
    };

    const STATE_CALLBACK: u32 = BPF_SOCK_OPS_STATE_CB_FLAG;

    #[sock_ops]
    fn warren_connect(context: SockOpsContext) -> u32 {
        let ops = Ops(context.ops);
        match ops.operation() {
            BPF_SOCK_OPS_TCP_CONNECT_CB => on_connect(&context, ops),
            BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => on_accepted(ops),
            BPF_SOCK_OPS_TCP_LISTEN_CB => on_listen(ops),
            BPF_SOCK_OPS_STATE_CB => on_state(ops),
            _ => {}
        }
        1
    }

    struct Outgoing {
        ops: Ops,
        mark: u32,
        destination: Address,
        port: u16,
    }

    impl ConnectFacts for Outgoing {
        #[inline(always)]
        fn mark(&self) -> u32 {
            self.mark
        }

        #[inline(always)]
        fn pod(&self) -> Option<PodNumber> {
            maps::pod_of(self.ops.namespace())
        }

        #[inline(always)]
        fn destination(&self) -> Address {
            self.destination
        }

        #[inline(always)]
        fn workload(&self) -> Option<WorkloadEntry> {
            maps::workload(self.destination)
        }

        #[inline(always)]
        fn service(&self) -> Option<ServiceEntry> {
            maps::service(self.destination, self.port)
        }

        #[inline(always)]
        fn is_in_ranges(&self) -> bool {
            maps::is_in_ranges(self.destination)
        }

        #[inline(always)]
        fn is_own_address(&self, pod: PodNumber) -> bool {
            maps::is_own_address(pod, self.destination)
        }

        #[inline(always)]
        fn is_listener_live(&self, pod: PodNumber) -> bool {
            maps::is_listener_live(pod, self.destination.family())
        }
    }

    /// Before the SYN is built; the route is chosen anew after it.
    #[inline(always)]
    fn on_connect(context: &SockOpsContext, ops: Ops) {
        let Some(socket) = ops.socket() else { return };
        let (destination, port) = ops.remote();
        let outgoing = Outgoing {
            ops,
            mark: socket.mark(),
            destination,
            port,
        };
        let reason = match connect(&outgoing) {
            Connect::Pass(Reason::ConnectNotCaptured) => {
                note_node_connect(ops);
                Reason::ConnectNotCaptured
            }
            Connect::Pass(reason) => reason,
            Connect::Steer(reason) => {
                divert(ops, socket, marks::STEER);
                reason
            }
            Connect::Refuse(reason) => {
                divert(ops, socket, marks::REFUSE);
                reason
            }
        };
        maps::count(reason);
        trace!(
            context,
            "connect to {:i} port {} reason={}",
            destination.octets(),
            port,
            reason.index()
        );
    }

    /// Sets the mark, and takes the socket off a device that would keep it from our routes. Where that is not allowed the
    /// guard drops it: no route can refuse it, since for a socket bound to a device the kernel makes one up.
    #[inline(always)]
    fn divert(ops: Ops, socket: Socket, mark: u32) {
        if socket.is_bound_to_device() {
            maps::count(if ops.unbind_device() {
                Reason::DeviceUnbound
            } else {
                Reason::DeviceKept
            });
        }
        if !ops.set_mark(mark) {
            maps::count(Reason::MarkFailed);
        }
    }

    /// Completes, with the port that is known only now, what `cgroup/connect` noted.
    #[inline(always)]
    fn note_node_connect(ops: Ops) {
        if maps::take_node_dial(ops.cookie()) {
            let ((source, source_port), (destination, port)) = (ops.local(), ops.remote());
            maps::note_node_connect(&FourTuple::new(source, source_port, destination, port), now());
            maps::count(Reason::NodeConnectNoted);
        }
    }

    #[inline(always)]
    fn on_accepted(ops: Ops) {
        // A child inherits its listener's callbacks; only the listener needs them.
        let callbacks = ops.callbacks();
        if callbacks & STATE_CALLBACK != 0 && (is_daemons(ops) || is_steered(ops)) {
            ops.set_callbacks(callbacks & !STATE_CALLBACK);
            return;
        }
        let ((source, source_port), (destination, port)) = (ops.remote(), ops.local());
        maps::forget_node_connect(&FourTuple::new(source, source_port, destination, port));
    }

    #[inline(always)]
    fn on_listen(ops: Ops) {
        if is_daemons(ops) {
            ops.set_callbacks(ops.callbacks() | STATE_CALLBACK);
        }
    }

    /// Runs when a listener closes, whatever closed it: also when its process was killed.
    #[inline(always)]
    fn on_state(ops: Ops) {
        let [before, after] = ops.arguments();
        if before != BPF_TCP_LISTEN || after != BPF_TCP_CLOSE {
            return;
        }
        if let Some(pod) = maps::pod_of(ops.namespace()) {
            maps::listener_closed(pod, ops.socket_family(), ops.cookie());
        }
    }

    /// By the mark: good enough to ask for a callback, never to trust.
    #[inline(always)]
    fn is_daemons(ops: Ops) -> bool {
        ops.socket().is_some_and(|socket| socket.mark() == marks::DAEMON)
    }

    /// What the outbound listener accepted.
    #[inline(always)]
    fn is_steered(ops: Ops) -> bool {
        ops.socket().is_some_and(|socket| socket.mark() == marks::STEER)
    }

    #[cgroup_sock_addr(connect4)]
    fn warren_dial4(context: SockAddrContext) -> i32 {
        on_dial(Dial(context.sock_addr), Family::V4)
    }

    #[cgroup_sock_addr(connect6)]
    fn warren_dial6(context: SockAddrContext) -> i32 {
        on_dial(Dial(context.sock_addr), Family::V6)
    }

    struct Dialling {
        dial: Dial,
        family: Family,
        node: NodeFacts,
    }

    impl NodeConnectFacts for Dialling {
        #[inline(always)]
        fn is_node_namespace(&self) -> bool {
            self.node.namespace() != 0 && self.node.namespace() == self.dial.namespace().get()
        }

        #[inline(always)]
        fn is_to_mesh(&self) -> bool {
            maps::workload(self.dial.destination(self.family)).is_some_and(|workload| workload.is_in_mesh())
        }

        #[inline(always)]
        fn is_in_kubepods(&self) -> bool {
            self.node.kubepods().is_some_and(is_below_cgroup)
        }
    }

    /// Before the route is chosen for the first time. Always lets the connect go on.
    #[inline(always)]
    fn on_dial(dial: Dial, family: Family) -> i32 {
        const GO_ON: i32 = 1;
        if !dial.is_tcp() {
            return GO_ON;
        }
        if let Some(socket) = dial.socket()
            && sheds_mark(socket.mark())
            && dial.set_mark(0)
        {
            maps::count(Reason::MarkCleared);
        }
        let dialling = Dialling {
            dial,
            family,
            node: maps::node(),
        };
        if is_node_connect(&dialling) {
            maps::note_node_dial(dial.cookie(), now());
        }
        GO_ON
    }

    /// As `TC_ACT_UNSPEC` or `TCX_NEXT`: whoever else is attached here decides as if we were not.
    const NEXT: i32 = -1;

    /// At egress of every interface of a pod but `lo`: one comparison for each packet.
    #[classifier]
    fn warren_guard(context: TcContext) -> i32 {
        match guard(packet_mark(context.skb.skb)) {
            Guard::Pass => NEXT,
            Guard::Drop(reason) => {
                maps::count(reason);
                TC_ACT_SHOT
            }
        }
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}
