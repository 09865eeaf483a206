//! Lines on their way out: a bounded buffer and a thread that writes it, so that a reader who does not read never holds up
//! a connection. What does not fit is dropped, counted, and said in the next line that gets through.

use parking_lot::{Condvar, Mutex};
use std::{
    fmt,
    io::{self, Write},
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Bytes that may wait.
pub(super) const CAPACITY: usize = 2 << 20;
/// A buffer that grew beyond this in a burst is given back.
const KEPT: usize = 64 << 10;
/// After a write, lines gather this long: a wake-up and a write for each line would cost more than the lines.
const GATHER: Duration = Duration::from_millis(10);
/// Before the next try at a sink that does not take anything at the moment.
const RETRY: Duration = Duration::from_millis(10);

/// The way out. Clones share it; the thread ends when all are gone.
#[derive(Clone)]
pub(super) struct Lines {
    owner: Arc<Owner>,
}

struct Owner(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Something to write, or the end.
    wake: Condvar,
    /// A batch is written.
    written: Condvar,
    dropped: AtomicU64,
    capacity: usize,
}

#[derive(Default)]
struct State {
    pending: Vec<u8>,
    lines: u64,
    /// Nobody writes: whoever adds a line wakes the thread.
    asleep: bool,
    /// A batch was taken and is not written yet.
    writing: bool,
    flushing: bool,
    ended: bool,
}

/// Formats the line that says how many were dropped.
pub(super) type Confess = fn(dropped: u64, line: &mut Vec<u8>);

impl Lines {
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(sink: impl Write + Send + 'static, capacity: usize, confess: Confess) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
            capacity,
        });
        let writer = Arc::clone(&shared);
        thread::Builder::new()
            .name("log".into())
            .spawn(move || writer.write_all(sink, confess))?;
        Ok(Self {
            owner: Arc::new(Owner(shared)),
        })
    }

    /// Adds a line, which ends in a line feed. Never waits for the sink.
    pub(super) fn push(&self, line: &[u8]) {
        let shared = &self.owner.0;
        let mut state = shared.state.lock();
        if state.pending.len() + line.len() > shared.capacity {
            drop(state);
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.pending.extend_from_slice(line);
        state.lines += 1;
        let wake = mem::take(&mut state.asleep);
        drop(state);
        if wake {
            shared.wake.notify_one();
        }
    }

    /// Lines that were dropped so far.
    pub(super) fn dropped(&self) -> u64 {
        self.owner.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything that was pushed is written, at most until the deadline; tells whether it is.
    pub(super) fn flush(&self, deadline: Duration) -> bool {
        let until = Instant::now() + deadline;
        let shared = &self.owner.0;
        let mut state = shared.state.lock();
        state.flushing = true;
        shared.wake.notify_one();
        while !state.pending.is_empty() || state.writing {
            if shared.written.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.flushing = false;
        state.pending.is_empty() && !state.writing
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines")
            .field("dropped", &self.dropped())
            .finish_non_exhaustive()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.state.lock().ended = true;
        self.0.wake.notify_one();
    }
}

impl Shared {
    fn write_all(&self, mut sink: impl Write, confess: Confess) {
        let mut batch = Vec::new();
        let mut confessed = 0;
        while let Some(lines) = self.next(&mut batch) {
            let dropped = self.dropped.load(Ordering::Relaxed);
            if dropped > confessed {
                confess(dropped - confessed, &mut batch);
                confessed = dropped;
            }
            if write(&mut sink, &batch).is_err() {
                // Nobody reads any more (a closed pipe): there is no place to say so but the counter.
                self.dropped.fetch_add(lines, Ordering::Relaxed);
                confessed += lines;
            }
            batch.clear();
            batch.shrink_to(KEPT);
            self.state.lock().writing = false;
            self.written.notify_all();
        }
    }

    /// Waits for lines and takes them; how many they are, or `None` at the end.
    fn next(&self, batch: &mut Vec<u8>) -> Option<u64> {
        let mut state = self.state.lock();
        let gathered = Instant::now() + GATHER;
        while !state.flushing && !state.ended && !self.wake.wait_until(&mut state, gathered).timed_out() {}
        while state.pending.is_empty() {
            if state.ended {
                return None;
            }
            state.asleep = true;
            self.wake.wait(&mut state);
        }
        state.asleep = false;
        state.writing = true;
        mem::swap(&mut state.pending, batch);
        Some(mem::take(&mut state.lines))
    }
}

/// Like `write_all`, for a sink that may have been left in non-blocking mode by whoever shares it.
fn write(sink: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(e) => return Err(e),
        }
    }
    sink.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(10);

    fn confess(dropped: u64, line: &mut Vec<u8>) {
        line.extend_from_slice(format!("dropped {dropped}\n").as_bytes());
    }

    /// Takes nothing until it is told to, then keeps everything.
    struct Sink {
        permits: mpsc::Receiver<()>,
        taken: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Once the sender is gone everything is taken.
            let _ = self.permits.recv();
            self.taken.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn blocked(capacity: usize) -> (Lines, mpsc::Sender<()>, Arc<Mutex<Vec<u8>>>) {
        let (permit, permits) = mpsc::channel();
        let taken = Arc::default();
        let lines = Lines::start(
            Sink {
                permits,
                taken: Arc::clone(&taken),
            },
            capacity,
            confess,
        )
        .unwrap();
        (lines, permit, taken)
    }

    #[test]
    fn a_blocked_reader_holds_up_nobody_and_what_is_lost_is_counted_and_said() {
        let (lines, permit, taken) = blocked(100);
        // Two lines are under way or fit, however fast the thread is; of the many after them most do not.
        let begin = Instant::now();
        for _ in 0..1000 {
            lines.push(b"0123456789012345678901234567890123456789012345678\n");
        }
        assert!(begin.elapsed() < LONG, "pushing waited for the reader");
        let dropped = lines.dropped();
        assert!(
            (996..=998).contains(&dropped),
            "{dropped} dropped: one or two batches of two lines fit"
        );
        drop(permit);
        assert!(lines.flush(LONG));
        lines.push(b"after\n");
        assert!(lines.flush(LONG));
        let taken = String::from_utf8(taken.lock().clone()).unwrap();
        assert_eq!(taken.matches("012345678\n").count() as u64, 1000 - dropped);
        // In one line or two: the thread may wake while lines are still being lost.
        let said: u64 = taken
            .lines()
            .filter_map(|line| line.strip_prefix("dropped ")?.parse::<u64>().ok())
            .sum();
        assert_eq!(said, dropped, "{taken}");
        assert!(taken.contains("after\n"));
    }

    #[test]
    fn lines_come_out_whole_and_in_order() {
        let (lines, permit, taken) = blocked(1 << 20);
        drop(permit);
        let expected: String = (0..10_000).map(|i| format!("line {i}\n")).collect();
        for line in expected.split_inclusive('\n') {
            lines.push(line.as_bytes());
        }
        assert!(lines.flush(LONG));
        assert_eq!(String::from_utf8(taken.lock().clone()).unwrap(), expected);
        assert_eq!(lines.dropped(), 0);
    }

    #[test]
    fn a_flush_does_not_wait_longer_than_its_deadline() {
        let (lines, _permit, _taken) = blocked(100);
        lines.push(b"stuck\n");
        assert!(!lines.flush(Duration::from_millis(20)));
    }

    #[test]
    fn lines_for_a_closed_reader_are_counted_as_dropped() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let lines = Lines::start(Closed, 100, confess).unwrap();
        lines.push(b"one\n");
        lines.push(b"two\n");
        assert!(lines.flush(LONG));
        assert_eq!(lines.dropped(), 2);
    }

    #[test]
    fn a_reader_that_would_block_gets_the_line_later() {
        struct Busy(u32, mpsc::Sender<Vec<u8>>);
        impl Write for Busy {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 += 1;
                match self.0 {
                    1 => Err(io::ErrorKind::WouldBlock.into()),
                    2 => Err(io::ErrorKind::Interrupted.into()),
                    _ => {
                        self.1.send(bytes[..1].to_vec()).unwrap();
                        Ok(1)
                    }
                }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sender, bytes) = mpsc::channel();
        let lines = Lines::start(Busy(0, sender), 100, confess).unwrap();
        lines.push(b"whole\n");
        assert!(lines.flush(LONG));
        assert_eq!(bytes.try_iter().flatten().collect::<Vec<u8>>(), b"whole\n");
    }
}
