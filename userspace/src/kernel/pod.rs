//! Attaching to one pod's namespace and detaching from it: the arrival program, and the guard at every way out.

use super::{
    AttachError, Kernel, MapError, pins,
    programs::{self, ARRIVAL},
    sys::{self, Target},
};
use crate::net::Namespace;
use aya::programs::{
    Link, LinkOrder, ProgramError, SchedClassifier, SkLookup, TcAttachType,
    links::FdLink,
    tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle},
};
use std::{
    fs, io, mem,
    os::fd::AsFd,
    path::{Path, PathBuf},
};
use warren_common::{PodNumber, tables::names};

/// Ours among the filters of a clsact qdisc, where there are no links.
const FILTER_PRIORITY: u16 = 1;
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0x5752);

/// An interface, by the name and index it has in its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Interface {
    name: String,
    index: u32,
}

impl Kernel {
    /// Attaches the arrival program to the namespace and the guard to each of its interfaces but `lo`; replaces those of
    /// an earlier daemon without a gap. On an error nothing stays attached that was not before.
    pub fn attach_pod(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        self.pods.lock().numbered(pod)?;
        let folder = self.pins.pod(pod);
        let is_new = !folder.exists();
        pins::make_folder(&folder).map_err(pin_error(&folder))?;
        let attached = self.attach_arrival(pod, namespace).and_then(|()| {
            self.forget_lost_guards(pod);
            namespace.run(|| {
                let interfaces = interfaces()?;
                interfaces.iter().try_for_each(|interface| self.guard(pod, interface))
            })?
        });
        if attached.is_err() && is_new {
            // Whatever this leaves behind is found by the next start: it belongs to no steered pod.
            let _ = self.unguard(namespace);
            let _ = pins::remove_folder(&folder);
        }
        attached
    }

    /// Attaches the guard to an interface that appeared later. Does nothing if it is there already, or if the interface
    /// is gone again.
    pub fn guard_interface(&self, pod: PodNumber, namespace: &Namespace, name: &str) -> Result<(), AttachError> {
        namespace.run(|| {
            let interfaces = interfaces()?;
            interfaces
                .iter()
                .filter(|interface| interface.name == name)
                .try_for_each(|interface| self.guard(pod, interface))
        })?
    }

    /// Detaches the programs, forgets the pod and frees its number. `None` if the namespace is gone.
    pub fn detach_pod(&self, pod: PodNumber, namespace: Option<&Namespace>) -> Result<(), AttachError> {
        let arrive = self.pins.arrive(pod);
        pins::unpin(&arrive).map_err(pin_error(&arrive))?;
        if let Some(namespace) = namespace {
            self.unguard(namespace)?;
        }
        let folder = self.pins.pod(pod);
        pins::remove_folder(&folder).map_err(pin_error(&folder))?;
        Ok(self.pods.lock().forget(pod)?)
    }

    fn attach_arrival(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        let refused = |source| AttachError::Program {
            program: ARRIVAL,
            source: Box::new(source),
        };
        let loaded = self.loading.arrive(pod).ok_or(MapError::NoSuchPod {
            number: pod.get(),
            size: self.loading.size(names::SETTINGS),
        })?;
        let mut ebpf = loaded.map_err(|source| AttachError::Load {
            source: Box::new(source),
        })?;
        let program: &mut SkLookup = ebpf
            .program_mut(ARRIVAL)
            .ok_or(AttachError::NoProgram { program: ARRIVAL })?
            .try_into()
            .map_err(refused)?;
        program.load().map_err(refused)?;

        let path = self.pins.arrive(pod);
        if let Ok(link) = sys::open_pin(&path) {
            let facts = sys::link_facts(link.as_fd()).map_err(pin_error(&path))?;
            if is_attached_to(facts.target, namespace) {
                let fd = program.fd().map_err(refused)?;
                return sys::update_link(link.as_fd(), fd.as_fd()).map_err(pin_error(&path));
            }
            // The number's last pod: its namespace is gone, or about to be.
            pins::unpin(&path).map_err(pin_error(&path))?;
        }
        let id = program.attach(namespace.as_fd()).map_err(refused)?;
        let link = FdLink::from(program.take_link(id).map_err(refused)?);
        pin(link, &path)
    }

    /// In the pod's namespace.
    fn guard(&self, pod: PodNumber, interface: &Interface) -> Result<(), AttachError> {
        let refused = |source| AttachError::Guard {
            interface: interface.name.clone(),
            source: Box::new(source),
        };
        let mut ebpf = self.ebpf.lock();
        let guard: &mut SchedClassifier = ebpf
            .program_mut(programs::GUARD)
            .ok_or(AttachError::NoProgram {
                program: programs::GUARD,
            })?
            .try_into()
            .map_err(refused)?;
        if !self.tcx {
            return guard_by_filter(guard, &interface.name).map_err(refused);
        }
        let path = self.pins.guard(pod, interface.index);
        if let Ok(link) = sys::open_pin(&path) {
            let facts = sys::link_facts(link.as_fd()).map_err(pin_error(&path))?;
            if facts.target == (Target::Interface { index: interface.index }) {
                if facts.program == self.guard_id {
                    return Ok(());
                }
                let fd = guard.fd().map_err(refused)?;
                return sys::update_link(link.as_fd(), fd.as_fd()).map_err(pin_error(&path));
            }
            pins::unpin(&path).map_err(pin_error(&path))?;
        }
        let id = guard
            .attach_with_options(
                &interface.name,
                TcAttachType::Egress,
                TcAttachOptions::TcxOrder(LinkOrder::first()),
            )
            .map_err(refused)?;
        let link = guard.take_link(id).map_err(refused)?;
        let link = FdLink::try_from(link).map_err(|error| pin_error(&path)(io::Error::other(error)))?;
        pin(link, &path)
    }

    /// Filters are not pinned and have to be taken off one by one; links go with their pins.
    fn unguard(&self, namespace: &Namespace) -> Result<(), AttachError> {
        if self.tcx {
            return Ok(());
        }
        namespace.run(|| {
            for interface in interfaces()? {
                // Absent is as good as removed.
                let _ = filter(&interface.name).map(|link| link.detach());
            }
            Ok(())
        })?
    }

    /// Links of interfaces that are gone.
    fn forget_lost_guards(&self, pod: PodNumber) {
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
}

fn is_attached_to(target: Target, namespace: &Namespace) -> bool {
    matches!(target, Target::Namespace { inode } if u64::from(inode) == namespace.inode().1)
}

/// Replaces our filter, or adds it.
fn guard_by_filter(guard: &mut SchedClassifier, interface: &str) -> Result<(), ProgramError> {
    let there = filter(interface).map_err(|error| ProgramError::from(tc::TcError::IoError(error)))?;
    let id = match guard.attach_to_link(there) {
        Ok(id) => id,
        Err(_) => {
            // It fails if the qdisc is there; whether it was needed the next call tells.
            let _ = tc::qdisc_add_clsact(interface);
            guard.attach_with_options(
                interface,
                TcAttachType::Egress,
                TcAttachOptions::Netlink(NlOptions {
                    priority: FILTER_PRIORITY,
                    handle: FILTER_HANDLE,
                    classid: None,
                }),
            )?
        }
    };
    // Dropping it would take the filter off; it is to outlive us.
    mem::forget(guard.take_link(id)?);
    Ok(())
}

fn filter(interface: &str) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, TcAttachType::Egress, FILTER_PRIORITY, FILTER_HANDLE, None)
}

/// Every interface of the calling thread's namespace but `lo`.
fn interfaces() -> Result<Vec<Interface>, AttachError> {
    let listed = nix::net::if_::if_nameindex().map_err(|errno| AttachError::Interfaces { source: errno.into() })?;
    Ok(listed
        .iter()
        .map(|interface| Interface {
            name: interface.name().to_string_lossy().into_owned(),
            index: interface.index(),
        })
        .filter(|interface| interface.name != "lo")
        .collect())
}

fn pin(link: FdLink, path: &Path) -> Result<(), AttachError> {
    link.pin(path)
        .map(drop)
        .map_err(|error| pin_error(path)(io::Error::other(error)))
}

fn pin_error(path: &Path) -> impl Fn(io::Error) -> AttachError {
    let path: PathBuf = path.to_owned();
    move |source| AttachError::Pin {
        path: path.clone(),
        source,
    }
}
