//! What the programs say of every decision, when asked to.

use super::Kernel;
use aya_log::EbpfLogger;
use std::io;
use tokio::io::unix::AsyncFd;

/// The lines of the programs, as log records of level trace. Reasons are numbers there, `Reason::ALL`'s.
pub struct TraceLog(EbpfLogger<&'static dyn log::Log>);

impl Kernel {
    /// The programs' lines; `None` if it was taken already.
    pub fn trace_log(&self) -> Option<TraceLog> {
        EbpfLogger::init(&mut self.ebpf.lock()).ok().map(TraceLog)
    }
}

impl TraceLog {
    /// Hands lines to the log for as long as it runs.
    pub async fn run(self) -> io::Result<()> {
        #[expect(deprecated, reason = "its successor is unsafe; the logger owns its descriptor for as long as it lives")]
        let mut ring = AsyncFd::new(self.0)?;
        loop {
            let mut ready = ring.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}
