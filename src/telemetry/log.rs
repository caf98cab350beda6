//! The log: its formats, its level, and the thread that writes it.
//!
//! The daemon's lines are written by a thread of their own, behind a bounded queue. When they are
//! not read, as with a container runtime that hangs or a paused terminal, lines are dropped and
//! counted, and delivery does not wait.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, IsTerminal as _, Write},
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    Registry,
    filter::Targets,
    fmt::{
        FmtContext, MakeWriter,
        format::{FormatEvent, FormatFields, Writer},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt as _,
};

use crate::config::LogConfig;

/// The most bytes of lines that wait to be written; about 20,000 lines.
const MAX_WAITING: usize = 4 * 1024 * 1024;

/// Bytes that a waiting line takes besides its text.
const LINE_OVERHEAD: usize = 64;

/// The longest that the end of the daemon waits for its last lines to be written.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// The pause before the next write to a terminal that another program made non-blocking.
const WRITE_RETRY: Duration = Duration::from_millis(10);

/// The log level; can be changed while the program runs. Clones are the same, and the default
/// changes nothing.
#[derive(Debug, Clone, Default)]
pub struct Level(Option<reload::Handle<Targets, Registry>>);

impl Level {
    pub fn set(&self, level: tracing::Level) {
        if let Some(handle) = &self.0 {
            // It fails when the log is gone, and then there is no level.
            handle.reload(targets(level)).ok();
        }
    }
}

/// Only hooktrail's own events: its libraries log whole messages, bodies included.
fn targets(level: tracing::Level) -> Targets {
    Targets::new().with_target("hooktrail", level)
}

/// Writes log events to stderr, each before the program goes on. For commands.
pub fn to_stderr(level: tracing::Level) {
    install(LogConfig { json: false, level }, io::stderr);
}

/// The daemon's log.
#[derive(Debug)]
pub struct Log {
    lines: Arc<Lines>,
    json: bool,
}

impl Log {
    /// Writes log events and panics to stderr, in a thread of its own. `dropped` gets numbers of
    /// lines that were not written.
    ///
    /// # Errors
    /// The system has no thread to write with.
    pub fn start(
        config: LogConfig,
        dropped: impl Fn(u64) + Send + Sync + 'static,
    ) -> io::Result<(Self, Level)> {
        let lines = Arc::new(Lines::new(dropped));
        let writing = lines.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || writing.write_to(&mut io::stderr()))?;
        let line = lines.clone();
        let level = install(config, move || Line(line.clone()));
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string);
            let backtrace = std::backtrace::Backtrace::capture();
            let backtrace = (backtrace.status() == std::backtrace::BacktraceStatus::Captured)
                .then(|| backtrace.to_string());
            tracing::error!(
                place,
                backtrace,
                "panicked: {}",
                panic.payload_as_str().unwrap_or("no text")
            );
        }));
        Ok((Self { lines, json: config.json }, level))
    }

    /// Writes the last line of a run that failed: a log event where the log is JSON, else `text`
    /// as a command prints it.
    pub fn fatal(&self, error: &str, text: &str) {
        if self.json {
            tracing::error!(error, "hooktrail ends");
        } else {
            self.lines.push(format!("{text}\n").into_bytes());
        }
    }

    /// Waits until everything logged is written, but not for long: a log that is not read must not
    /// keep the daemon from its end.
    pub fn finish(self) {
        self.lines.wait_written(FINISH_TIMEOUT);
    }
}

/// The first log of a process stays, which only tests notice.
fn install<W: for<'w> MakeWriter<'w> + Send + Sync + 'static>(
    config: LogConfig,
    writer: W,
) -> Level {
    let (filter, level) = reload::Layer::new(targets(config.level));
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_target(false);
    let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let installed = if config.json {
        registry.with(layer.json().flatten_event(true).with_current_span(false)).try_init()
    } else if is_the_journal() {
        let format = tracing_subscriber::fmt::format().with_target(false);
        registry.with(layer.with_ansi(false).event_format(Prioritized(format))).try_init()
    } else {
        registry.with(layer.with_ansi(ansi)).try_init()
    };
    Level(installed.is_ok().then_some(level))
}

/// Whether stderr leads into systemd's journal, by `$JOURNAL_STREAM` (systemd.exec(5)).
fn is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    // An inherited variable may be of another process with another stderr.
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// Begins each line with its priority (sd-daemon(3)), which the journal shows and filters by.
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let priority = match *event.metadata().level() {
            tracing::Level::ERROR => 3,
            tracing::Level::WARN => 4,
            tracing::Level::INFO => 6,
            _ => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

/// Lines that wait for the writing thread.
struct Lines {
    state: Mutex<Waiting>,
    /// Notified when there is something to write, and when everything is written.
    changed: Condvar,
    dropped: Box<dyn Fn(u64) + Send + Sync>,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines dropped since the last report of it.
    dropped: u64,
    /// Lines were taken and are not written yet.
    writing: bool,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").finish_non_exhaustive()
    }
}

impl Lines {
    fn new(dropped: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), dropped: Box::new(dropped) }
    }

    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_lines(&self, state: &mut Waiting, lines: u64) {
        state.dropped += lines;
        (self.dropped)(lines);
    }

    fn push(&self, line: Vec<u8>) {
        let mut state = self.state();
        if state.bytes + line.len() + LINE_OVERHEAD > MAX_WAITING {
            self.drop_lines(&mut state, 1);
            return;
        }
        state.bytes += line.len() + LINE_OVERHEAD;
        state.lines.push_back(line);
        self.changed.notify_all();
    }

    /// Waits for lines and takes all there are.
    fn take(&self) -> VecDeque<Vec<u8>> {
        let mut state = self.state();
        while state.lines.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.bytes = 0;
        state.writing = true;
        std::mem::take(&mut state.lines)
    }

    /// Ends the writing of what was taken; `lost` lines of it failed. Returns how many dropped lines
    /// are to be reported.
    fn written(&self, lost: u64) -> u64 {
        let mut state = self.state();
        if lost > 0 {
            self.drop_lines(&mut state, lost);
        }
        state.writing = false;
        self.changed.notify_all();
        // While writing fails, so would the line about it.
        if lost > 0 { 0 } else { std::mem::take(&mut state.dropped) }
    }

    fn wait_written(&self, at_most: Duration) {
        let unwritten = |state: &mut Waiting| state.writing || !state.lines.is_empty();
        drop(self.changed.wait_timeout_while(self.state(), at_most, unwritten));
    }

    /// Writes indefinitely.
    fn write_to(&self, to: &mut impl Write) {
        loop {
            let lines = self.take();
            let lost = lines.into_iter().filter(|line| write_line(to, line).is_err()).count();
            let unreported = self.written(lost as u64);
            if unreported > 0 {
                tracing::warn!(
                    lines = unreported,
                    "lines of the log were dropped: they were not read, or could not be written"
                );
            }
        }
    }
}

fn write_line(to: &mut impl Write, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match to.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => line = &line[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::park_timeout(WRITE_RETRY),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Takes one line; each is written at once.
struct Line(Arc<Lines>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    };

    /// Writes a line when the test says so, or fails.
    struct Reader {
        go_on: mpsc::Receiver<io::Result<()>>,
        read: mpsc::Sender<usize>,
    }

    impl Write for Reader {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.go_on.recv().expect("the test lives")?;
            self.read.send(line.len()).expect("the test lives");
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_are_not_read_are_dropped_and_counted_and_delay_nothing() {
        let counted = Arc::new(AtomicU64::new(0));
        let counter = counted.clone();
        let lines = Arc::new(Lines::new(move |n| {
            counter.fetch_add(n, Ordering::SeqCst);
        }));
        let (go_on, wait) = mpsc::channel();
        let (read, seen) = mpsc::channel();
        let writing = lines.clone();
        thread::spawn(move || writing.write_to(&mut Reader { go_on: wait, read }));
        let line = || vec![b'x'; 1024 - LINE_OVERHEAD];
        let room = MAX_WAITING / 1024;
        for _ in 0..2 * room + 100 {
            lines.push(line());
        }
        let dropped = counted.load(Ordering::SeqCst);
        // The writer took some lines before it stopped, at most as many again: that made room.
        let most = room as u64 + 100;
        assert!((100..=most).contains(&dropped), "{dropped}");
        lines.wait_written(Duration::from_millis(1));
        // One of them fails.
        go_on.send(Err(io::ErrorKind::BrokenPipe.into())).expect("it is there");
        for _ in 1..2 * room as u64 + 100 - dropped {
            go_on.send(Ok(())).expect("it is there");
            assert_eq!(seen.recv().expect("it is there"), line().len());
        }
        lines.wait_written(Duration::from_secs(60));
        assert_eq!(counted.load(Ordering::SeqCst), dropped + 1);
        assert_eq!(lines.state().bytes, 0);
    }
}
