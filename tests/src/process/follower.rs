//! A file that somebody goes on writing, line by line.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};

#[derive(Debug)]
pub struct Follower {
    file: File,
    /// A line that is not finished yet.
    rest: Vec<u8>,
}

impl Follower {
    pub(super) fn at_end_of(path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self { file, rest: Vec::new() })
    }

    /// The lines that were finished since the last call. Does not wait.
    pub fn new_lines(&mut self) -> Result<Vec<String>> {
        self.file.read_to_end(&mut self.rest)?;
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(Vec::new());
        };
        let rest = self.rest.split_off(end + 1);
        let finished = std::mem::replace(&mut self.rest, rest);
        Ok(String::from_utf8_lossy(&finished).lines().map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_line_is_given_once_and_when_it_is_finished() -> Result<()> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(b"before\n")?;
        let mut follower = Follower::at_end_of(file.path())?;
        assert!(follower.new_lines()?.is_empty());
        file.write_all(b"one\ntw")?;
        assert_eq!(follower.new_lines()?, ["one"]);
        assert!(follower.new_lines()?.is_empty());
        file.write_all(b"o\nthree\n")?;
        assert_eq!(follower.new_lines()?, ["two", "three"]);
        Ok(())
    }
}
