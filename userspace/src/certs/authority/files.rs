//! The files of a CA in Istio's plug-in form, and the directory that holds them: made on first start, or filled by the
//! operator. Not here: what the CA does (`authority`), and the Secret that holds the same files (`controller`).

use super::{Authority, AuthorityError, read_key};
use crate::certs::bundle::{BundleError, TrustBundle};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

pub const CA_CERT: &str = "ca-cert.pem";
pub const CA_KEY: &str = "ca-key.pem";
pub const ROOT_CERT: &str = "root-cert.pem";
pub const CERT_CHAIN: &str = "cert-chain.pem";
const FILES: [&str; 4] = [CA_CERT, CA_KEY, ROOT_CERT, CERT_CHAIN];
/// Held while a CA is being made, so that two controllers on one directory agree on one.
const LOCK: &str = ".lock";

const LIFETIME: Duration = Duration::from_secs(3650 * 86_400);
/// Nodes whose clock is behind shall accept the new root at once.
const BACKDATE: Duration = Duration::from_secs(86_400);

/// Where an authority came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Generated,
    Loaded,
}

/// The four files, as they are. A file that is not there is told from an empty one.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct CaFiles(BTreeMap<String, Vec<u8>>);

impl CaFiles {
    /// Of the files given, those that are a CA's.
    pub fn of(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let known = |(name, _): &(String, Vec<u8>)| FILES.contains(&name.as_str());
        Self(files.into_iter().filter(known).collect())
    }

    /// A new self-signed CA, valid for ten years.
    ///
    /// # Errors
    /// The cryptography library fails.
    pub fn generate(now: UnixTime) -> Result<Self, AuthorityError> {
        let made = Generated::new(now).map_err(AuthorityError::Generate)?;
        let certificate = pem("CERTIFICATE", &made.certificate).into_bytes();
        let key = made.key.serialize_pem().into_bytes();
        let certificates = [CERT_CHAIN, ROOT_CERT, CA_CERT].map(|name| (name.to_owned(), certificate.clone()));
        Ok(Self::of(certificates.into_iter().chain([(CA_KEY.to_owned(), key)])))
    }

    /// What is in `dir` now. Blocks on the file system.
    ///
    /// # Errors
    /// A file that is there and cannot be read.
    pub fn read(dir: &Path) -> Result<Self, CaDirError> {
        let mut files = BTreeMap::new();
        for name in FILES {
            let path = dir.join(name);
            match fs::read(&path) {
                Ok(text) => drop(files.insert(name.to_owned(), text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(CaDirError::Read { path, source }),
            }
        }
        Ok(Self(files))
    }

    /// True if none of a CA's files is there.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn into_files(self) -> impl Iterator<Item = (String, Vec<u8>)> {
        self.0.into_iter()
    }
}

impl fmt::Debug for CaFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Why a directory, or a Secret, gives no CA.
#[derive(Debug, thiserror::Error)]
pub enum CaDirError {
    #[error("{} is missing, while other files of a CA are there; put it back, or take the others away as well for a new CA", path.display())]
    Missing { path: PathBuf },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} holds no certificate", path.display())]
    NoCertificate { path: PathBuf },
    #[error("{} is not PEM", path.display())]
    Pem { path: PathBuf },
    #[error("{} cannot be used as roots", path.display())]
    Roots { path: PathBuf, source: BundleError },
    #[error("the CA in {} cannot be used", path.display())]
    Authority { path: PathBuf, source: AuthorityError },
}

impl Authority {
    /// The CA in `dir`; if there is none at all, a new one is made there. Blocks on the file system.
    ///
    /// # Errors
    /// A part that is missing, cannot be read or does not fit the others. Nothing is ever overwritten.
    pub fn open(dir: &Path, now: UnixTime) -> Result<(Self, Origin), CaDirError> {
        let origin = if present(dir)? == FILES.len() {
            Origin::Loaded
        } else {
            generate(dir, now)?
        };
        Ok((Self::of_files(&CaFiles::read(dir)?, dir, now)?, origin))
    }

    /// The CA of these files, which lie at `place`.
    ///
    /// # Errors
    /// A part that is missing or does not fit the others.
    pub fn of_files(files: &CaFiles, place: &Path, now: UnixTime) -> Result<Self, CaDirError> {
        load(files, place, now)
    }
}

/// A fresh self-signed CA and its key.
pub(super) struct Generated {
    pub(super) key: KeyPair,
    pub(super) certificate: CertificateDer<'static>,
}

impl Generated {
    pub(super) fn new(now: UnixTime) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
        let mut params = CertificateParams::default();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + LIFETIME).into();
        params.serial_number = Some(super::leaf::random_serial().to_vec().into());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = DistinguishedName::new();
        // Told apart in tables and by path building, should a cluster ever meet two.
        let tail = params
            .key_identifier(&key)
            .iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("Warren CA {tail}"));
        let certificate = params.self_signed(&key)?.into();
        Ok(Self { key, certificate })
    }
}

fn present(dir: &Path) -> Result<usize, CaDirError> {
    let mut count = 0;
    for name in FILES {
        let path = dir.join(name);
        count += usize::from(path.try_exists().map_err(|source| CaDirError::Read { path, source })?);
    }
    Ok(count)
}

/// Makes a CA where there is nothing. Where there is something, another controller was faster, or the operator left
/// something out: loading will tell.
fn generate(dir: &Path, now: UnixTime) -> Result<Origin, CaDirError> {
    let path = dir.join(LOCK);
    let lock = || {
        fs::create_dir_all(dir)?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)?;
        lock.lock()?;
        Ok(lock)
    };
    let _lock: File = match lock() {
        Ok(lock) => lock,
        // A mounted secret is read-only, and nobody makes a CA there.
        Err(_) if present(dir)? > 0 => return Ok(Origin::Loaded),
        Err(source) => return Err(CaDirError::Write { path, source }),
    };
    if present(dir)? > 0 {
        return Ok(Origin::Loaded);
    }
    let made = CaFiles::generate(now).map_err(|source| CaDirError::Authority {
        path: dir.to_owned(),
        source,
    })?;
    // The key first: whoever finds a certificate finds its key as well.
    for name in [CA_KEY, CERT_CHAIN, ROOT_CERT, CA_CERT] {
        let mode = if name == CA_KEY { 0o600 } else { 0o644 };
        write(dir, name, made.0.get(name).map_or(&[], Vec::as_slice), mode)?;
    }
    Ok(Origin::Generated)
}

/// Whole or not at all: written beside, flushed to disk, then renamed.
fn write(dir: &Path, name: &str, text: &[u8], mode: u32) -> Result<(), CaDirError> {
    let (path, beside) = (dir.join(name), dir.join(format!(".{name}.new")));
    let attempt = || {
        let _ = fs::remove_file(&beside);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&beside, &path)?;
        File::open(dir)?.sync_all()
    };
    attempt().map_err(|source| CaDirError::Write {
        path: path.clone(),
        source,
    })
}

fn load(files: &CaFiles, dir: &Path, now: UnixTime) -> Result<Authority, CaDirError> {
    let file = |name: &str| {
        let missing = || CaDirError::Missing { path: dir.join(name) };
        files.0.get(name).map(Vec::as_slice).ok_or_else(missing)
    };
    let certificates = |name: &str| {
        let path = dir.join(name);
        let list = CertificateDer::pem_slice_iter(file(name)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| CaDirError::Pem { path: path.clone() })?;
        if list.is_empty() {
            Err(CaDirError::NoCertificate { path })
        } else {
            Ok(list)
        }
    };
    let mut own = certificates(CA_CERT)?;
    let mut above = own.split_off(1);
    above.extend(certificates(CERT_CHAIN)?);
    let roots = TrustBundle::from_der(certificates(ROOT_CERT)?).map_err(|source| CaDirError::Roots {
        path: dir.join(ROOT_CERT),
        source,
    })?;
    let unfit = |source| CaDirError::Authority {
        path: dir.to_owned(),
        source,
    };
    let key = read_key(file(CA_KEY)?).map_err(unfit)?;
    Authority::new(key, &own[0], above, roots, now).map_err(unfit)
}

/// PEM text of DER bytes (RFC 7468: base64, 64 characters a line).
pub(in crate::certs) fn pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for three in line.chunks(3) {
            let bits = three
                .iter()
                .enumerate()
                .fold(0_u32, |bits, (i, byte)| bits | u32::from(*byte) << (16 - 8 * i));
            for i in 0..4 {
                let sextet = ALPHABET[(bits >> (18 - 6 * i)) as usize & 0x3f];
                text.push(if i <= three.len() { char::from(sextet) } else { '=' });
            }
        }
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}
