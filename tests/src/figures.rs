//! Where the figures of a measurement go: as JSON into a file, for machines, and as text to standard output, for people.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

/// What the command line of a measurement says about it.
#[derive(Debug, clap::Args)]
pub struct Figures {
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Figures {
    /// Writes the file, if one is wanted, and prints the text.
    ///
    /// # Errors
    /// The file or standard output cannot be written.
    pub fn put(&self, report: &impl Serialize, text: &str) -> Result<()> {
        if let Some(path) = &self.out {
            let json = serde_json::to_string_pretty(report)?;
            fs::write(path, json + "\n").with_context(|| format!("write {}", path.display()))?;
        }
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }
}
