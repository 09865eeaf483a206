//! What the programs say of every decision, when `KernelConfig::trace` asks them to.

use super::{Kernel, Reason, sys};
use aya_log::EbpfLogger;
use std::io;
use tracing::trace;

/// The programs' lines, on their way to the log at level trace.
pub struct TraceLog(EbpfLogger<Named>);

impl Kernel {
    /// The lines of the node's programs and of every pod's; `None` if somebody has them already.
    pub fn trace_log(&self) -> Option<TraceLog> {
        EbpfLogger::init_with_logger(&mut self.ebpf.lock(), Named)
            .ok()
            .map(TraceLog)
    }
}

impl TraceLog {
    /// Logs lines for as long as it runs.
    pub async fn run(self) -> io::Result<()> {
        let mut ring = sys::watch_ring(self.0)?;
        loop {
            let mut ready = ring.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}

/// The programs say a reason's number and an IPv4 address as it is in the maps; readers want a name and the address.
struct Named;

impl log::Log for Named {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = record.args().to_string().replace("::ffff:", "");
        match split_reason(&line) {
            Some((line, reason)) => trace!(reason = reason.name(), "{line}"),
            None => trace!("{line}"),
        }
    }

    fn flush(&self) {}
}

fn split_reason(line: &str) -> Option<(&str, Reason)> {
    let (line, number) = line.rsplit_once(" reason=")?;
    Some((line, *Reason::ALL.get(number.parse::<usize>().ok()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_ends_in_a_reasons_number_gets_its_name() {
        let last = Reason::ALL.len() - 1;
        assert_eq!(
            split_reason(&format!("connect to 10.0.0.1 port 80 reason={last}")),
            Some(("connect to 10.0.0.1 port 80", Reason::ALL[last]))
        );
        assert_eq!(split_reason(&format!("connect reason={}", last + 1)), None);
        assert_eq!(split_reason("reason=3"), None);
    }
}
