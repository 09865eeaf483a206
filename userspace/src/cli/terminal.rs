//! How the commands look: a mark and a line per component on standard output, what is under way on standard error, colour
//! and movement on a terminal alone.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal, Write},
    sync::OnceLock,
};

/// Components stand in a column of this width.
const COLUMN: usize = 20;
/// Where longer text goes on in the next line.
const WIDTH: usize = 100;
const SPINNER: [char; 10] = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏'];

/// What a line says about its component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mark {
    Good,
    Warning,
    Bad,
}

impl Mark {
    fn symbol(self) -> char {
        match self {
            Self::Good => '✔',
            Self::Warning => '!',
            Self::Bad => '✗',
        }
    }

    fn colour(self) -> &'static str {
        match self {
            Self::Good => "\x1b[32m",
            Self::Warning => "\x1b[33m",
            Self::Bad => "\x1b[31m",
        }
    }
}

/// One component's line.
fn line(mark: Mark, component: &str, text: &str, colour: bool) -> String {
    let (on, off) = if colour { (mark.colour(), "\x1b[0m") } else { ("", "") };
    let mut line = format!("{on}{}{off} {component}", mark.symbol());
    let width = component.chars().count();
    if !text.is_empty() {
        line.extend(std::iter::repeat_n(' ', COLUMN.saturating_sub(width).max(1)));
        line.push_str(text);
    }
    line.push('\n');
    line
}

/// Text below a line, indented and wrapped between words; `first` stands before it.
pub(super) fn below(first: &str, text: &str) -> String {
    let indent = 2 + first.chars().count();
    let mut out = format!("  {first}");
    let mut at = indent;
    for (index, word) in text.split_whitespace().enumerate() {
        let length = word.chars().count();
        if index > 0 {
            if at + 1 + length > WIDTH {
                let _ = write!(out, "\n{:indent$}", "");
                at = indent;
            } else {
                out.push(' ');
                at += 1;
            }
        }
        out.push_str(word);
        at += length;
    }
    out.push('\n');
    out
}

/// Prints a component's line.
pub(super) fn tell(mark: Mark, component: &str, text: &str) {
    print(&line(mark, component, text, colours(&io::stdout())));
}

/// Prints on standard output. A reader that is gone has what it wants.
pub(super) fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn colours(stream: &impl IsTerminal) -> bool {
    static ASKED_NOT_TO: OnceLock<bool> = OnceLock::new();
    let plain = *ASKED_NOT_TO.get_or_init(|| {
        std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb")
    });
    !plain && stream.is_terminal()
}

/// What is under way, in one line that is written over; nothing where nobody watches.
#[derive(Debug)]
pub(super) struct Progress {
    moves: bool,
    step: usize,
    shown: bool,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            moves: colours(&io::stderr()),
            step: 0,
            shown: false,
        }
    }

    pub(super) fn show(&mut self, text: &str) {
        if !self.moves {
            return;
        }
        let spinner = SPINNER[self.step % SPINNER.len()];
        self.step += 1;
        self.shown = true;
        let text: String = text.chars().take(WIDTH).collect();
        let _ = write!(io::stderr(), "\r\x1b[K{spinner} {text}");
    }

    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stand_in_one_column() {
        assert_eq!(
            line(Mark::Good, "Node daemons", "2 of 2 ready", false),
            "✔ Node daemons        2 of 2 ready\n"
        );
        assert_eq!(line(Mark::Bad, "Namespace", "", false), "✗ Namespace\n");
    }

    #[test]
    fn a_long_text_goes_on_below_its_beginning() {
        let text = below("→ ", &"word ".repeat(40));
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(
            text.lines().nth(1).is_some_and(|line| line.starts_with("    word")),
            "{text}"
        );
    }
}
