//! Which node a bearer token belongs to: a file of lines `token node-name`, read again for every request, so that a token
//! taken out is refused at once. Tokens never reach a log.

use crate::certs::read_bounded;
use parking_lot::Mutex;
use std::{collections::BTreeSet, fmt, hint::black_box, io, path::PathBuf, sync::Arc};
use tracing::{info, warn};

const MAX_FILE_BYTES: usize = 1 << 20;

/// Tokens and their nodes. A node may have several (while a token is being replaced), a token has one node.
#[derive(Default, Clone, PartialEq, Eq)]
pub struct Tokens(Vec<(Box<[u8]>, Arc<str>)>);

/// Why a line is skipped; it says nothing of the line's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenLineError {
    #[error("it is not `token node-name`")]
    Form,
    #[error("it has a character that is not visible ASCII")]
    Character,
    #[error("its token is given to another node in an earlier line")]
    Ambiguous,
}

impl Tokens {
    /// Reads the lines; blank ones and those that begin with `#` are passed over. What is malformed is given back by
    /// line number, counted from 1.
    pub fn parse(text: &[u8]) -> (Self, Vec<(usize, TokenLineError)>) {
        let mut tokens = Self::default();
        let mut malformed = Vec::new();
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            if let Err(error) = tokens.add(line) {
                malformed.push((index + 1, error));
            }
        }
        (tokens, malformed)
    }

    fn add(&mut self, line: &[u8]) -> Result<(), TokenLineError> {
        if !line
            .iter()
            .all(|byte| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\t'))
        {
            return Err(TokenLineError::Character);
        }
        let words: Vec<_> = line
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty())
            .collect();
        let [token, node] = words.as_slice() else {
            return Err(TokenLineError::Form);
        };
        let node: Arc<str> = String::from_utf8_lossy(node).into();
        match self.node_of(token) {
            Some(other) if *other != *node => Err(TokenLineError::Ambiguous),
            Some(_) => Ok(()),
            None => {
                self.0.push((Box::from(*token), node));
                Ok(())
            }
        }
    }

    /// The node of a token. Looks at every line and every byte, so that the time it takes tells nothing of a token's
    /// content (only of its length).
    pub fn node_of(&self, token: &[u8]) -> Option<Arc<str>> {
        let mut found = None;
        for (candidate, node) in &self.0 {
            if same(candidate, token) {
                found = Some(node.clone());
            }
        }
        found
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn nodes(&self) -> usize {
        self.0.iter().map(|(_, node)| node).collect::<BTreeSet<_>>().len()
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.len())
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    let difference = a
        .iter()
        .zip(b)
        .fold(0, |difference, (x, y)| black_box(difference | (x ^ y)));
    a.len() == b.len() && difference == 0
}

/// The file, with what was last read from it.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    last: Mutex<(Vec<u8>, Arc<Tokens>)>,
}

impl TokenFile {
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            last: Mutex::default(),
        }
    }

    pub fn path(&self) -> &PathBuf {
        &self.path
    }

    /// What the file says now. Malformed lines are logged once per state of the file.
    ///
    /// # Errors
    /// A file that cannot be read: then nobody is let in, since it may have been there to take a token away.
    pub async fn current(&self) -> io::Result<Arc<Tokens>> {
        let text = read_bounded(&self.path, MAX_FILE_BYTES).await?;
        let mut last = self.last.lock();
        if last.0 != text {
            let (tokens, malformed) = Tokens::parse(&text);
            let file = self.path.display();
            for (line, error) in malformed {
                warn!(%file, line, %error, "line of the token file skipped");
            }
            info!(%file, tokens = tokens.len(), nodes = tokens.nodes(), "token file read");
            *last = (text, Arc::new(tokens));
        }
        Ok(last.1.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_line_is_named_by_number_and_harms_no_other() {
        let text =
            b"# nodes\nt1 node-a\n\n  t2\tnode-b  \nlonely\na b c\nt\xff node-c\nt1 node-b\nt1 node-a\nt3 node-a";
        let (tokens, malformed) = Tokens::parse(text);
        assert_eq!(
            malformed,
            [
                (5, TokenLineError::Form),
                (6, TokenLineError::Form),
                (7, TokenLineError::Character),
                (8, TokenLineError::Ambiguous)
            ]
        );
        let node = |token: &str| tokens.node_of(token.as_bytes()).map(|node| node.to_string());
        assert_eq!(node("t1").as_deref(), Some("node-a"));
        assert_eq!(node("t2").as_deref(), Some("node-b"));
        assert_eq!(node("t3").as_deref(), Some("node-a"));
        assert_eq!(node("lonely"), None);
        assert_eq!(tokens.len(), 3);
    }

    #[test]
    fn only_the_whole_token_opens() {
        let (tokens, _) = Tokens::parse(b"secret node-a");
        for wrong in ["", "s", "secre", "secret2", "Secret", "secret ", "aecret"] {
            assert_eq!(tokens.node_of(wrong.as_bytes()), None, "{wrong}");
        }
        assert!(tokens.node_of(b"secret").is_some());
    }

    #[test]
    fn tokens_do_not_show_in_debug_output() {
        let (tokens, _) = Tokens::parse(b"secret node-a");
        assert_eq!(format!("{tokens:?}"), "Tokens(1)");
    }
}
