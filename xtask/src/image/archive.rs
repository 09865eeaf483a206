//! An image archive in OCI's layout (image-spec 1.1), with Docker's `manifest.json` beside it: one platform, one layer, no
//! compression. Pure: from contents to bytes, without a clock, so that equal contents give an equal digest.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::contents::Contents;

const BEGINNING_OF_TIME: &str = "1970-01-01T00:00:00Z";

/// What an image is made of.
pub(super) struct Image {
    /// `repository:tag`.
    pub(super) reference: String,
    /// As OCI calls it: `amd64`.
    pub(super) architecture: &'static str,
    pub(super) version: &'static str,
    pub(super) contents: Contents,
}

/// Bytes that are named by their digest.
struct Blob {
    media_type: &'static str,
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        let sum = Sha256::digest(&bytes);
        let digest: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            media_type,
            digest,
            bytes,
        }
    }

    fn json(media_type: &'static str, value: &Value) -> Self {
        Self::new(media_type, value.to_string().into_bytes())
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }

    fn descriptor(&self) -> Value {
        json!({
            "mediaType": self.media_type,
            "digest": format!("sha256:{}", self.digest),
            "size": self.bytes.len(),
        })
    }
}

impl Image {
    /// The archive's bytes.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        let layer = Blob::new("application/vnd.oci.image.layer.v1.tar", layer(&self.contents)?);
        let config = Blob::json("application/vnd.oci.image.config.v1+json", &self.config(&layer));
        let manifest = Blob::json(
            "application/vnd.oci.image.manifest.v1+json",
            &json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": config.descriptor(),
                "layers": [layer.descriptor()],
            }),
        );
        let mut named = manifest.descriptor();
        named["platform"] = json!({ "architecture": self.architecture, "os": "linux" });
        // containerd takes the whole name from the first; the second is what other tools look for.
        named["annotations"] = json!({
            "io.containerd.image.name": self.reference,
            "org.opencontainers.image.ref.name": self.reference,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [named],
        });
        let for_docker = json!([{
            "Config": config.path(),
            "RepoTags": [self.reference],
            "Layers": [layer.path()],
        }]);

        let mut tar = Builder::new(Vec::new());
        file(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
        file(&mut tar, "index.json", index.to_string().as_bytes(), 0o644)?;
        file(&mut tar, "manifest.json", for_docker.to_string().as_bytes(), 0o644)?;
        directory(&mut tar, "blobs")?;
        directory(&mut tar, "blobs/sha256")?;
        for blob in [&config, &manifest, &layer] {
            file(&mut tar, &blob.path(), &blob.bytes, 0o644)?;
        }
        tar.into_inner().context("cannot end the archive")
    }

    fn config(&self, layer: &Blob) -> Value {
        let label = |name: &str| format!("org.opencontainers.image.{name}");
        json!({
            "created": BEGINNING_OF_TIME,
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Entrypoint": ["/warren"],
                "Env": ["PATH=/"],
                "WorkingDir": "/",
                "Labels": {
                    label("title"): "Warren",
                    label("description"): "A service mesh for Kubernetes without sidecars",
                    label("version"): self.version,
                    label("licenses"): "Apache-2.0",
                },
            },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", layer.digest)] },
            "history": [{ "created": BEGINNING_OF_TIME, "created_by": "cargo xtask image" }],
        })
    }
}

/// The one layer: every folder before what is in it.
fn layer(contents: &Contents) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for folder in &contents.folders {
        directory(&mut tar, folder)?;
    }
    for entry in &contents.files {
        file(&mut tar, &entry.path, &entry.bytes, entry.mode)?;
    }
    tar.into_inner().context("cannot end the layer")
}

fn file(tar: &mut Builder<Vec<u8>>, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
    append(tar, path, EntryType::Regular, mode, bytes)
}

fn directory(tar: &mut Builder<Vec<u8>>, path: &str) -> Result<()> {
    append(tar, &format!("{path}/"), EntryType::Directory, 0o755, &[])
}

/// Owner, group and time are 0 in a header that nobody sets.
fn append(tar: &mut Builder<Vec<u8>>, path: &str, kind: EntryType, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, Path::new(path), bytes)
        .with_context(|| format!("cannot add {path}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::super::contents::File;
    use super::*;

    fn image() -> Image {
        Image {
            reference: "warren.mesh/warren:1.2.3".to_owned(),
            architecture: "amd64",
            version: "1.2.3",
            contents: Contents {
                folders: vec!["etc".to_owned()],
                files: vec![File {
                    path: "warren".to_owned(),
                    mode: 0o755,
                    bytes: b"the binary".to_vec(),
                }],
            },
        }
    }

    fn entries(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut tar = tar::Archive::new(archive);
        let entries = tar.entries().expect("an archive");
        let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.expect("an entry");
            let path = entry.path().expect("a path").to_string_lossy().into_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("its bytes");
            (path, bytes)
        };
        entries.map(read).collect()
    }

    fn document(entries: &BTreeMap<String, Vec<u8>>, path: &str) -> Value {
        serde_json::from_slice(&entries[path]).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    #[test]
    fn equal_contents_give_equal_bytes() {
        assert_eq!(
            image().archive().expect("an archive"),
            image().archive().expect("an archive")
        );
    }

    #[test]
    fn every_blob_has_the_digest_and_size_by_which_it_is_named() {
        let entries = entries(&image().archive().expect("an archive"));
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().expect("a digest");
            let bytes = &entries[&format!("blobs/{}", digest.replace(':', "/"))];
            assert_eq!(descriptor["size"], bytes.len());
            let sum: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(digest, format!("sha256:{sum}"));
            bytes.clone()
        };
        let index = document(&entries, "index.json");
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).expect("a manifest");
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).expect("a config");
        let layer = blob(&manifest["layers"][0]);
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"]);
        assert_eq!(config["config"]["Entrypoint"], json!(["/warren"]));
        assert_eq!(self::entries(&layer)["warren"], b"the binary");
    }

    #[test]
    fn docker_and_containerd_find_the_same_name() {
        let entries = entries(&image().archive().expect("an archive"));
        let index = document(&entries, "index.json");
        let docker = document(&entries, "manifest.json");
        assert_eq!(
            index["manifests"][0]["annotations"]["io.containerd.image.name"],
            docker[0]["RepoTags"][0]
        );
        for path in [&docker[0]["Config"], &docker[0]["Layers"][0]] {
            assert!(entries.contains_key(path.as_str().expect("a path")), "{path}");
        }
    }
}
