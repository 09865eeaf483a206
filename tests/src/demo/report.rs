//! What the person sees: progress on stderr, one line per thing shown on stdout. Knows nothing of the mesh.

use std::fmt;
use std::io::{IsTerminal as _, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Counts what was shown, and what was not so.
pub struct Report {
    out: Box<dyn Write + Send>,
    shown: u32,
    failed: u32,
    coloured: bool,
    spinner: Option<ProgressBar>,
}

impl fmt::Debug for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Report {{ shown: {}, failed: {} }}", self.shown, self.failed)
    }
}

impl Report {
    /// A report on the terminal.
    pub fn on_terminal() -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            let style =
                ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
            bar.set_style(style);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            coloured: std::io::stdout().is_terminal(),
            spinner,
            ..Self::to(Box::new(std::io::stdout()))
        }
    }

    /// A plain report without progress.
    pub fn to(out: Box<dyn Write + Send>) -> Self {
        Self {
            out,
            shown: 0,
            failed: 0,
            coloured: false,
            spinner: None,
        }
    }

    /// What is being done, for someone who waits.
    pub fn progress(&self, what: &str) {
        match &self.spinner {
            Some(bar) => bar.set_message(what.to_owned()),
            None => eprintln!("… {what}"),
        }
    }

    /// A heading of the report.
    pub fn section(&mut self, title: &str) {
        let title = self.painted("1", title);
        self.print(&format!("\n{title}"));
    }

    /// Does what shows `claim`, and prints how that went: what `work` says it saw, and how long it took.
    pub fn show(&mut self, claim: &str, work: impl FnOnce() -> Result<String>) -> bool {
        if let Some(bar) = &self.spinner {
            bar.set_message(claim.to_owned());
        }
        let begin = Instant::now();
        let outcome = work();
        let took = milliseconds(begin.elapsed());
        self.shown += 1;
        match outcome {
            Ok(seen) => {
                let seen = if seen.is_empty() { seen } else { format!(": {seen}") };
                let mark = self.painted("32", "✓");
                self.print(&format!("  {mark} {claim}{seen} ({took})"));
                true
            }
            Err(error) => {
                self.failed += 1;
                let mark = self.painted("31", "✗");
                self.print(&format!("  {mark} {claim} ({took})"));
                for line in format!("{error:#}").lines() {
                    self.quote(line);
                }
                false
            }
        }
    }

    /// Something seen, word for word, below the line it belongs to.
    pub fn quote(&mut self, line: &str) {
        let line = self.painted("2", line);
        self.print(&format!("      {line}"));
    }

    /// A line that claims nothing.
    pub fn remark(&mut self, line: &str) {
        self.print(line);
    }

    /// The last line. Whether everything was so.
    pub fn finish(mut self) -> bool {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
        let last = match self.failed {
            0 => format!(
                "{} {} of {} things shown are so",
                self.painted("32", "✓"),
                self.shown,
                self.shown
            ),
            failed => format!(
                "{} {failed} of {} things shown are not so",
                self.painted("31", "✗"),
                self.shown
            ),
        };
        self.print(&format!("\n{last}"));
        self.failed == 0
    }

    /// Ends without a last line.
    pub fn finish_silently(self) {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
    }

    /// Whether anything was not so up to now.
    pub fn has_failed(&self) -> bool {
        self.failed > 0
    }

    fn painted(&self, colour: &str, text: &str) -> String {
        if self.coloured {
            format!("\u{1b}[{colour}m{text}\u{1b}[0m")
        } else {
            text.to_owned()
        }
    }

    fn print(&mut self, line: &str) {
        // A reader that closed the pipe has seen enough; the demo still cleans up in order.
        let out = &mut self.out;
        let mut write = || drop(writeln!(out, "{line}").and_then(|()| out.flush()));
        match &self.spinner {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

fn milliseconds(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.1} s", time.as_secs_f32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_that_is_not_so_fails_the_whole() {
        let mut report = Report::to(Box::new(std::io::sink()));
        assert!(report.show("water is wet", || Ok(String::new())));
        assert!(!report.has_failed());
        assert!(!report.show("pigs fly", || anyhow::bail!("they walk")));
        assert!(report.show("grass is green", || Ok("very".to_owned())));
        assert!(!report.finish());
    }
}
