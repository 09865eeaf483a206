//! Opening the kernel side: load the programs over what is pinned, put them in the place of an earlier daemon's, and see
//! which of its pods are still there.

use super::{
    AdoptedPod, Found, Kernel, KernelConfig, OpenError, Tcx,
    cgroup::{self, Cgroup},
    pins::{self, Pins},
    programs::{self, Loading},
    sys::{self, Target},
    tables::{ClusterTables, Counters, PodTables},
};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSockAddr, ProgramError, ProgramFd, SchedClassifier, SockOps, links::FdLink},
    util::KernelVersion,
};
use parking_lot::Mutex;
use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};
use warren_common::PodNumber;

/// `ingress_ifindex` in sk_lookup: without it an arrival on `lo` cannot be told from one from outside.
const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 17, 0);
/// Links for classifiers.
const TCX_KERNEL: KernelVersion = KernelVersion::new(6, 6, 0);

pub(super) fn open(config: &KernelConfig) -> Result<Kernel, OpenError> {
    let version = kernel_version()?;
    let root = match &config.cgroup {
        Some(path) => path.clone(),
        None => cgroup::root()?,
    };
    let cgroup = Cgroup::open(&root)?;
    let kubepods_path = match &config.kubepods {
        Some(path) => Some(path.clone()),
        // What is not below the watched folder is not seen, so it cannot be mistaken for the node's own either.
        None => cgroup::find_kubepods(&root),
    };
    let kubepods = kubepods_path
        .as_deref()
        .map(Cgroup::open)
        .transpose()?
        .map(|cgroup| cgroup.id);

    let pins = Pins::open(&config.pin_dir)?;
    let loading = Loading::new(&pins, &config.sizes, config.trace);
    let mut ebpf = loading.steer().map_err(|source| OpenError::Load {
        source: Box::new(source),
    })?;
    let cluster = ClusterTables::adopt(&mut ebpf, &loading)?;
    let mut pods = PodTables::adopt(&mut ebpf, &loading)?;
    let counters = Counters::adopt(&mut ebpf)?;
    let found = adopt_pods(&pins, &mut pods)?;

    attach_to_node(&mut ebpf, &cgroup, &pins)?;
    let guard_id = load_guard(&mut ebpf)?;

    Ok(Kernel {
        pins,
        loading,
        tcx: config.tcx == Tcx::Auto && version >= TCX_KERNEL,
        kubepods,
        guard_id,
        ebpf: Mutex::new(ebpf),
        cluster: Mutex::new(cluster),
        pods: Mutex::new(pods),
        counters,
        cgroup,
        found: Mutex::new(found),
    })
}

pub(super) fn readopt(kernel: &Kernel) -> Result<(), OpenError> {
    kernel.cluster.lock().reread()?;
    let mut pods = kernel.pods.lock();
    pods.reread()?;
    let found = adopt_pods(&kernel.pins, &mut pods)?;
    let mut ebpf = kernel.ebpf.lock();
    for name in [programs::DIAL4, programs::DIAL6] {
        let program: &mut CgroupSockAddr = program(&mut ebpf, name)?;
        put_back(kernel, name, program.fd())?;
    }
    let connect: &mut SockOps = program(&mut ebpf, programs::CONNECT)?;
    put_back(kernel, programs::CONNECT, connect.fd())?;
    *kernel.found.lock() = found;
    Ok(())
}

/// Gives a pinned link of the node's our program again.
fn put_back(kernel: &Kernel, name: &'static str, fd: Result<&ProgramFd, ProgramError>) -> Result<(), OpenError> {
    let path = kernel.pins.link(name);
    let fd = fd.map_err(|source| refused(name, source))?;
    if replace(&path, fd.as_fd(), &kernel.cgroup)? {
        return Ok(());
    }
    Err(OpenError::Pin {
        path,
        source: io::ErrorKind::NotFound.into(),
    })
}

fn kernel_version() -> Result<KernelVersion, OpenError> {
    let version = KernelVersion::current().map_err(|error| OpenError::KernelUnknown {
        source: io::Error::other(error.to_string()),
    })?;
    if version < OLDEST_KERNEL {
        let found = nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned());
        return Err(OpenError::KernelTooOld {
            found: found.unwrap_or_default(),
        });
    }
    Ok(version)
}

/// The pods that are still there. The others' pins and entries are removed: those whose namespace is gone, and those
/// that were not steered yet (or no longer) when the earlier daemon ended; of the latter the namespaces' inodes.
fn adopt_pods(pins: &Pins, pods: &mut PodTables) -> Result<Found, OpenError> {
    let pinned = pins.pinned_pods().map_err(|source| OpenError::Pin {
        path: pins.maps(),
        source,
    })?;
    let namespace = |pod: PodNumber| {
        let link = sys::open_pin(&pins.arrive(pod)).ok()?;
        match sys::link_facts(link.as_fd()).ok()?.target {
            Target::Namespace { inode } => Some(inode),
            Target::Cgroup { .. } | Target::Interface { .. } | Target::Other => None,
        }
    };
    let mut unfinished = Vec::new();
    for pod in pinned {
        let inode = namespace(pod);
        let is_steered = pods.numbered.contains_key(&pod);
        if inode == Some(0) || !is_steered {
            unfinished.extend(inode.filter(|inode| *inode != 0));
            let path = pins.pod(pod);
            pins::remove_folder(&path).map_err(|source| OpenError::Pin { path, source })?;
            pods.forget(pod)?;
        }
    }
    let adopted = pods
        .numbered
        .iter()
        .map(|(number, numbered)| AdoptedPod {
            number: *number,
            cookie: numbered.cookie,
            inode: namespace(*number).unwrap_or(0),
        })
        .collect();
    Ok(Found { adopted, unfinished })
}

/// Loads and attaches what serves all pods. An earlier daemon's programs serve until the moment ours take their place.
fn attach_to_node(ebpf: &mut Ebpf, cgroup: &Cgroup, pins: &Pins) -> Result<(), OpenError> {
    for name in [programs::DIAL4, programs::DIAL6] {
        let refused = |source| refused(name, source);
        let program: &mut CgroupSockAddr = program(ebpf, name)?;
        program.load().map_err(refused)?;
        let path = pins.link(name);
        if replace(&path, program.fd().map_err(refused)?.as_fd(), cgroup)? {
            continue;
        }
        let id = program
            .attach(&cgroup.folder, CgroupAttachMode::Single)
            .map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        pin(FdLink::try_from(link).map_err(io::Error::other), &path)?;
    }
    let refused = |source| refused(programs::CONNECT, source);
    let program: &mut SockOps = program(ebpf, programs::CONNECT)?;
    program.load().map_err(refused)?;
    let path = pins.link(programs::CONNECT);
    if !replace(&path, program.fd().map_err(refused)?.as_fd(), cgroup)? {
        let id = program
            .attach(&cgroup.folder, CgroupAttachMode::Single)
            .map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        pin(FdLink::try_from(link).map_err(io::Error::other), &path)?;
    }
    Ok(())
}

/// Gives a pinned link our program. False if there is none, or one at another cgroup: then it is gone now.
fn replace(path: &Path, program: BorrowedFd<'_>, cgroup: &Cgroup) -> Result<bool, OpenError> {
    let failed = |source| OpenError::Pin {
        path: path.to_owned(),
        source,
    };
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    if sys::link_facts(link.as_fd()).map_err(failed)?.target != (Target::Cgroup { id: cgroup.id }) {
        pins::unpin(path).map_err(failed)?;
        return Ok(false);
    }
    sys::update_link(link.as_fd(), program).map_err(failed)?;
    Ok(true)
}

fn pin(link: io::Result<FdLink>, path: &Path) -> Result<(), OpenError> {
    link.and_then(|link| link.pin(path).map_err(io::Error::other))
        .map(drop)
        .map_err(|source| OpenError::Pin {
            path: path.to_owned(),
            source,
        })
}

/// Loads the guard; returns its id.
fn load_guard(ebpf: &mut Ebpf) -> Result<u32, OpenError> {
    let refused = |source| refused(programs::GUARD, source);
    let guard: &mut SchedClassifier = program(ebpf, programs::GUARD)?;
    guard.load().map_err(refused)?;
    Ok(guard.info().map_err(refused)?.id())
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, OpenError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or(OpenError::NoProgram { program: name })?
        .try_into()
        .map_err(|source| refused(name, source))
}

fn refused(program: &'static str, source: ProgramError) -> OpenError {
    OpenError::Program {
        program,
        source: Box::new(source),
    }
}

impl Kernel {
    /// Takes everything that is pinned off the node: programs, links, maps. Once no pod is captured any more.
    pub fn remove_pins(&self) -> Result<(), OpenError> {
        self.pins.remove().map_err(|source| OpenError::Pin {
            path: self.pins.maps(),
            source,
        })
    }

    /// Removes what daemons with another layout left pinned. Call it once every pod is captured anew: until then their
    /// programs are what keeps those pods from speaking in the clear.
    pub fn remove_other_layouts(&self) -> Result<usize, OpenError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            |source| OpenError::Pin { path, source }
        };
        let others = self.pins.other_layouts().map_err(failed(&self.pins.maps()))?;
        for folder in &others {
            fs::remove_dir_all(folder).map_err(failed(folder))?;
        }
        Ok(others.len())
    }
}
