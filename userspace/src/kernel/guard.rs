//! The guard at every way out of a pod: what carries the steering mark and has lost its way stays inside.
//!
//! Where the kernel has links for it, a pod has filters at first and links later. A link cannot be taken off by anyone in
//! the pod, but the kernel waits for a grace period of RCU when one comes and when one goes, and keeps its lock for all
//! networking meanwhile: 8 to 16 ms, for which every other pod that starts on the node waits, too. So a start never waits
//! for it, and a pod that is soon gone never has one.

use super::{
    AttachError, Kernel, clsact,
    interfaces::{Interface, interfaces},
    pins::{self, pin, pin_error},
    programs,
    sys::{self, Target},
};
use crate::net::Namespace;
use aya::programs::{
    Link, LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use parking_lot::MappedMutexGuard;
use std::{fs, io, mem, os::fd::AsFd};
use warren_common::PodNumber;

/// Ours among the filters of a clsact qdisc.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x5752);

impl Interface {
    fn refused(&self, source: ProgramError) -> AttachError {
        AttachError::Guard {
            interface: self.name.clone(),
            source: Box::new(source),
        }
    }
}

impl Kernel {
    /// Attaches the guard to each interface of the namespace but `lo`; replaces that of an earlier daemon without a gap.
    pub(super) fn guard(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        self.guard_those(pod, namespace, |_| true)
    }

    /// Attaches the guard to an interface that appeared later. Does nothing if it is there already, or if the interface
    /// is gone again.
    pub fn guard_interface(&self, pod: PodNumber, namespace: &Namespace, name: &str) -> Result<(), AttachError> {
        self.guard_those(pod, namespace, |interface| interface.name == name)
    }

    fn guard_those(
        &self,
        pod: PodNumber,
        namespace: &Namespace,
        is_meant: impl Fn(&Interface) -> bool,
    ) -> Result<(), AttachError> {
        let interfaces = interfaces(namespace)?;
        namespace.run(|| {
            interfaces
                .iter()
                .filter(|interface| is_meant(interface))
                .try_for_each(|interface| {
                    if self.tcx && self.has_link(pod, interface)? {
                        return Ok(());
                    }
                    self.put_filter(interface).or_else(|error| match self.tcx {
                        true => self.put_link(pod, interface),
                        false => Err(error),
                    })
                })
        })?
    }

    /// Puts a link in the place of each filter, where the kernel has links. Slow: the kernel's networking stands still for
    /// some milliseconds. The pod is one that is attached.
    pub fn link_guards(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        if !self.tcx {
            return Ok(());
        }
        let interfaces = interfaces(namespace)?;
        namespace.run(|| {
            for interface in &interfaces {
                if !self.has_link(pod, interface)? {
                    self.put_link(pod, interface)?;
                }
                take_filter(interface);
            }
            Ok::<_, AttachError>(())
        })??;
        clsact::remove_unused(namespace);
        Ok(())
    }

    /// Links go with their pins; filters have to be taken off one by one.
    pub(super) fn unguard(&self, namespace: &Namespace) -> Result<(), AttachError> {
        let interfaces = interfaces(namespace)?;
        namespace.run(|| interfaces.iter().for_each(take_filter))?;
        clsact::remove_unused(namespace);
        Ok(())
    }

    /// Links of interfaces that are gone.
    pub(super) fn forget_lost_guards(&self, pod: PodNumber) {
        let Ok(pinned) = fs::read_dir(self.pins.pod(pod)) else {
            return;
        };
        for path in pinned.flatten().map(|entry| entry.path()) {
            let facts = sys::open_pin(&path).and_then(|link| sys::link_facts(link.as_fd()));
            if facts.is_ok_and(|facts| facts.target == (Target::Interface { index: 0 })) {
                let _ = pins::unpin(&path);
            }
        }
    }

    /// Whether the interface has a link, which then carries our program.
    fn has_link(&self, pod: PodNumber, interface: &Interface) -> Result<bool, AttachError> {
        let path = self.pins.guard(pod, interface.index);
        let Ok(link) = sys::open_pin(&path) else {
            return Ok(false);
        };
        let facts = sys::link_facts(link.as_fd()).map_err(pin_error(&path))?;
        if facts.target != (Target::Interface { index: interface.index }) {
            pins::unpin(&path).map_err(pin_error(&path))?;
            return Ok(false);
        }
        if facts.program != self.guard_id {
            let guard = self.guard_program(interface)?;
            let fd = guard.fd().map_err(|source| interface.refused(source))?;
            sys::update_link(link.as_fd(), fd.as_fd()).map_err(pin_error(&path))?;
        }
        Ok(true)
    }

    /// In the pod's namespace.
    fn put_link(&self, pod: PodNumber, interface: &Interface) -> Result<(), AttachError> {
        let refused = |source| interface.refused(source);
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let mut guard = self.guard_program(interface)?;
        let id = guard
            .attach_with_options(&interface.name, TcAttachType::Egress, options)
            .map_err(refused)?;
        let link = guard.take_link(id).map_err(refused)?;
        let path = self.pins.guard(pod, interface.index);
        let link = FdLink::try_from(link).map_err(|error| pin_error(&path)(io::Error::other(error)))?;
        pin(link, &path)
    }

    /// In the pod's namespace. Adds our filter, or replaces it.
    fn put_filter(&self, interface: &Interface) -> Result<(), AttachError> {
        let refused = |source| interface.refused(source);
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: FILTER_PRIORITY,
            handle: FILTER_HANDLE,
            classid: None,
        });
        // It fails if the qdisc is there; whether it was needed the next call tells.
        let _ = tc::qdisc_add_clsact(&interface.name);
        let mut guard = self.guard_program(interface)?;
        let id = match guard.attach_with_options(&interface.name, TcAttachType::Egress, options) {
            Ok(id) => id,
            Err(added) => {
                let there = filter(interface).map_err(|error| refused(tc::TcError::IoError(error).into()))?;
                guard.attach_to_link(there).map_err(|_| refused(added))?
            }
        };
        // Dropping it would take the filter off; it is to outlive us.
        mem::forget(guard.take_link(id).map_err(refused)?);
        Ok(())
    }

    fn guard_program(&self, interface: &Interface) -> Result<MappedMutexGuard<'_, SchedClassifier>, AttachError> {
        let program = programs::GUARD;
        let ebpf = parking_lot::MutexGuard::try_map_or_err(self.ebpf.lock(), |ebpf| {
            let found = ebpf.program_mut(program).ok_or(AttachError::NoProgram { program })?;
            <&mut SchedClassifier>::try_from(found).map_err(|source| interface.refused(source))
        });
        ebpf.map_err(|(_, error)| error)
    }
}

/// Absent is as good as removed.
fn take_filter(interface: &Interface) {
    let _ = filter(interface).map(|link| link.detach());
}

fn filter(interface: &Interface) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        &interface.name,
        TcAttachType::Egress,
        FILTER_PRIORITY,
        FILTER_HANDLE,
        None,
    )
}
