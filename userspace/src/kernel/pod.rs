//! Attaching to one pod's namespace and detaching from it: the arrival program; the guard is the business of `guard`.

use super::{
    AttachError, Kernel, MapError,
    pins::{self, pin, pin_error},
    programs::ARRIVAL,
    sys::{self, Target},
};
use crate::net::Namespace;
use aya::programs::{SkLookup, links::FdLink};
use std::os::fd::AsFd;
use warren_common::{PodNumber, tables::names};

impl Kernel {
    /// Attaches the guard to each interface of the namespace but `lo`; replaces that of an earlier daemon without a gap. On
    /// an error `detach_pod` takes off what was attached.
    pub fn guard_pod(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        self.make_room(pod)?;
        self.forget_lost_guards(pod);
        self.guard(pod, namespace)
    }

    /// Attaches the arrival program to the namespace; replaces that of an earlier daemon without a gap. On an error nothing
    /// is attached that was not before.
    pub fn attach_pod(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        self.make_room(pod)?;
        self.attach_arrival(pod, namespace)
    }

    fn make_room(&self, pod: PodNumber) -> Result<(), AttachError> {
        self.pods.lock().numbered(pod)?;
        let folder = self.pins.pod(pod);
        pins::make_folder(&folder).map_err(pin_error(&folder))
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
}

fn is_attached_to(target: Target, namespace: &Namespace) -> bool {
    matches!(target, Target::Namespace { inode } if u64::from(inode) == namespace.inode().1)
}
