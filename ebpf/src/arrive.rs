//! What arrives at one pod: `sk_lookup`, an instance for each pod, since the kernel does not tell it whose namespace it
//! runs in. `warren_common::arrival` decides.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{Global, bindings::sk_action, macros::sk_lookup, programs::SkLookupContext};
    use aya_log_ebpf::trace;
    use warren_common::{
        Address, FourTuple, PlaintextMode, PodNumber, PodSettings, Role,
        arrival::{Absent, Arrival, ArrivalFacts, arrive},
    };
    use warren_ebpf::{context::Lookup, helpers::now, maps};

    /// The pod this instance serves; the loader sets it.
    #[unsafe(no_mangle)]
    static POD: Global<u32> = Global::new(0);

    /// `lo` is the first interface of every namespace.
    const LOOPBACK_INTERFACE: u32 = 1;

    struct Arriving {
        lookup: Lookup,
        connection: FourTuple,
        pod: PodNumber,
    }

    impl ArrivalFacts for Arriving {
        #[inline(always)]
        fn destination(&self) -> Address {
            self.connection.destination()
        }

        #[inline(always)]
        fn destination_port(&self) -> u16 {
            self.connection.destination_port()
        }

        #[inline(always)]
        fn is_on_loopback_device(&self) -> bool {
            self.lookup.interface() == LOOPBACK_INTERFACE
        }

        #[inline(always)]
        fn settings(&self) -> PodSettings {
            maps::settings(self.pod)
        }

        #[inline(always)]
        fn is_to_own_address(&self) -> bool {
            maps::is_own_address(self.pod, self.connection.destination())
        }

        #[inline(always)]
        fn is_from_own_address(&self) -> bool {
            maps::is_own_address(self.pod, self.connection.source())
        }

        #[inline(always)]
        fn is_listening(&self, role: Role) -> bool {
            maps::is_listening(self.pod, role, self.connection.destination().family())
        }

        #[inline(always)]
        fn is_noted_by_node(&self) -> bool {
            maps::is_noted_by_node(&self.connection, now())
        }

        #[inline(always)]
        fn is_from_node_address(&self) -> bool {
            maps::is_own_address(PodNumber::NODE, self.connection.source())
        }

        #[inline(always)]
        fn port_mode(&self) -> Option<PlaintextMode> {
            maps::port_mode(self.pod, self.connection.destination_port())
        }
    }

    #[sk_lookup]
    fn warren_arrive(context: SkLookupContext) -> u32 {
        let lookup = Lookup(context.lookup);
        if !lookup.is_tcp() {
            return sk_action::SK_PASS;
        }
        let arriving = Arriving {
            lookup,
            connection: lookup.tuple(),
            pod: PodNumber::new(POD.load()),
        };
        let (action, reason) = match arrive(&arriving) {
            Arrival::Pass(reason) => (sk_action::SK_PASS, reason),
            Arrival::Drop(reason) => (sk_action::SK_DROP, reason),
            Arrival::Hand { role, reason, absent } => {
                if maps::hand_to(&context, arriving.pod, role, arriving.connection.destination().family()) {
                    (sk_action::SK_PASS, reason)
                } else {
                    match absent {
                        Absent::Pass(reason) => (sk_action::SK_PASS, reason),
                        Absent::Drop(reason) => (sk_action::SK_DROP, reason),
                    }
                }
            }
        };
        maps::count(reason);
        trace!(
            &context,
            "pod {} reached at {:i} port {} from {:i} reason={}",
            arriving.pod.get(),
            arriving.connection.destination().octets(),
            arriving.connection.destination_port(),
            arriving.connection.source().octets(),
            reason.index()
        );
        action
    }

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}
