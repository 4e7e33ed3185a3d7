//! Logging to containerd: logfmt lines into the FIFO `<bundle>/log`.
//!
//! containerd copies what it reads there into its own log. Three things can go wrong with such a
//! pipe, and none may be felt by the shim: nobody reads yet (or containerd is being restarted), the
//! reader has stopped reading while the pipe is full, and the reader is gone. So callers only ever
//! append to a bounded queue; one thread of its own does the writing and may wait as long as it
//! must. What the queue cannot take is counted, and the count is logged when there is room again.
//!
//! The FIFO is opened for reading *and* writing (`fifo(7)`): that never waits for a reader, never
//! raises `EPIPE`, and what the pipe held when a reader went away is still there for the next one.
//! The read end is never read, and the kernel closes both when the process ends, so containerd
//! sees the end of file then.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::kv::{self, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Lines that wait for the writer; about 100 KiB of usual ones.
const QUEUE_LINES: usize = 512;
/// A longer line is cut: one record cannot fill the pipe, whose usual size is 64 KiB.
const MAX_LINE: usize = 8 * 1024;

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log file exists but cannot be opened.
    #[error("cannot open the log {path}: {source}")]
    Open {
        /// `<bundle>/log`.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The writer's thread could not be started.
    #[error("cannot start the log's writer thread: {0}")]
    Thread(io::Error),
}

/// Installs the process's logger, which writes to `path` (a FIFO or a file), or to stderr if there
/// is nothing at `path`. `fields` are appended to each line, so that lines of several shims in
/// containerd's log can be told apart.
///
/// Only the first call of a process has an effect.
pub fn install(path: &Path, level: LevelFilter, fields: &[(&str, &str)]) -> Result<(), Error> {
    let logger = Logger::open(path, fields)?;
    if LOGGER.set(logger).is_ok()
        && let Some(logger) = LOGGER.get()
    {
        // Fails only if another logger was installed, which then stays.
        let _ = log::set_logger(logger);
    }
    log::set_max_level(level);
    Ok(())
}

/// Waits until what was logged before is written, at most for `limit`. For the end of the process;
/// returns `false` if the reader did not take everything in time.
pub fn flush(limit: Duration) -> bool {
    LOGGER.get().is_none_or(|logger| logger.drain(limit))
}

/// One message for the writer's thread.
enum Entry {
    Line(String),
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

/// The `log` crate's side: formats and enqueues, never waits.
struct Logger {
    queue: SyncSender<Entry>,
    dropped: Arc<AtomicU64>,
    suffix: String,
}

impl Logger {
    fn open(path: &Path, fields: &[(&str, &str)]) -> Result<Logger, Error> {
        let sink =
            Sink::open(path).map_err(|source| Error::Open { path: path.to_path_buf(), source })?;
        let mut suffix = String::new();
        for (key, value) in fields {
            push_field(&mut suffix, key, value);
        }
        let dropped = Arc::new(AtomicU64::new(0));
        let (queue, entries) = sync_channel(QUEUE_LINES);
        let writer =
            Writer { entries, sink, dropped: dropped.clone(), reported: 0, suffix: suffix.clone() };
        thread::Builder::new()
            .name("log".to_string())
            .stack_size(128 * 1024)
            .spawn(move || writer.run())
            .map_err(Error::Thread)?;
        Ok(Logger { queue, dropped, suffix })
    }

    fn drain(&self, limit: Duration) -> bool {
        let (done, wait) = sync_channel(1);
        // A full queue means the reader does not read; waiting for room would be waiting for it.
        self.queue.try_send(Entry::Flush(done)).is_ok() && wait.recv_timeout(limit).is_ok()
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        // The macros have compared the level already.
        let line = format_line(SystemTime::now(), record, &self.suffix);
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Entry::Line(line)) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {
        self.drain(Duration::from_millis(100));
    }
}

/// The thread that writes.
struct Writer {
    entries: Receiver<Entry>,
    sink: Sink,
    dropped: Arc<AtomicU64>,
    reported: u64,
    suffix: String,
}

impl Writer {
    fn run(mut self) {
        while let Ok(entry) = self.entries.recv() {
            match entry {
                Entry::Line(line) => {
                    self.sink.write(line.as_bytes());
                    self.report_dropped();
                }
                Entry::Flush(done) => {
                    let _ = done.send(());
                }
            }
        }
    }

    /// Right after a write succeeded there is a reader, so the gap is reported where it happened.
    fn report_dropped(&mut self) {
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped == self.reported {
            return;
        }
        let count = dropped - self.reported;
        self.reported = dropped;
        let mut line = String::new();
        push_time(&mut line, SystemTime::now());
        line.push_str(" level=warning");
        push_field(&mut line, "msg", "log lines were dropped: nobody read the log fast enough");
        push_field(&mut line, "count", &count.to_string());
        line.push_str(&self.suffix);
        line.push('\n');
        self.sink.write(line.as_bytes());
    }
}

/// Where lines go.
enum Sink {
    File(File),
    Stderr,
}

impl Sink {
    fn open(path: &Path) -> io::Result<Sink> {
        let opened = OpenOptions::new()
            .read(true)
            .append(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits())
            .open(path);
        match opened {
            Ok(file) => Ok(Sink::File(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Sink::Stderr),
            Err(e) => Err(e),
        }
    }

    /// Writes all of `bytes`, waiting for room as long as it takes. An error other than a full pipe
    /// loses the line: there is nowhere to report it.
    fn write(&mut self, bytes: &[u8]) {
        match self {
            Sink::Stderr => {
                let _ = io::stderr().write_all(bytes);
            }
            Sink::File(file) => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    match file.write(rest) {
                        Ok(0) => return,
                        Ok(n) => rest = &rest[n..],
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
                            let _ = poll(&mut fds, PollTimeout::NONE);
                        }
                        Err(_) => return,
                    }
                }
            }
        }
    }
}

/// Maps the configuration's words, which are containerd's, to a level.
pub fn parse_level(word: &str) -> Option<LevelFilter> {
    Some(match word.to_ascii_lowercase().as_str() {
        "trace" => LevelFilter::Trace,
        "debug" => LevelFilter::Debug,
        "info" => LevelFilter::Info,
        "warn" | "warning" => LevelFilter::Warn,
        "error" | "fatal" | "panic" => LevelFilter::Error,
        _ => return None,
    })
}

fn format_line(time: SystemTime, record: &Record<'_>, suffix: &str) -> String {
    let mut line = String::with_capacity(160);
    push_time(&mut line, time);
    let level = match record.level() {
        log::Level::Error => "error",
        // logrus' word, which whoever filters containerd's log looks for.
        log::Level::Warn => "warning",
        log::Level::Info => "info",
        log::Level::Debug => "debug",
        log::Level::Trace => "trace",
    };
    line.push_str(" level=");
    line.push_str(level);
    push_field(&mut line, "msg", &record.args().to_string());
    let _ = record.key_values().visit(&mut Fields(&mut line));
    if line.len() + suffix.len() > MAX_LINE {
        let mut end = MAX_LINE.saturating_sub(suffix.len() + 8);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        // The cut may have opened a quoted value; close it so that the suffix stays parsable.
        line.push_str("…\"");
    }
    line.push_str(suffix);
    line.push('\n');
    line
}

struct Fields<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for Fields<'_> {
    fn visit_pair(&mut self, key: kv::Key<'kvs>, value: kv::Value<'kvs>) -> Result<(), kv::Error> {
        push_field(self.0, key.as_str(), &value.to_string());
        Ok(())
    }
}

/// Appends ` key=value`, quoted where a reader of logfmt would need it. Keys come from the source,
/// values from anywhere: no value can end the line or start another field.
fn push_field(line: &mut String, key: &str, value: &str) {
    line.push(' ');
    line.push_str(key);
    line.push('=');
    let plain = !value.is_empty()
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._/@^+:,".contains(&b));
    if plain {
        line.push_str(value);
        return;
    }
    line.push('"');
    for c in value.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            c if c.is_control() => {
                let _ = write!(line, "\\u{:04x}", c as u32);
            }
            c => line.push(c),
        }
    }
    line.push('"');
}

/// `time="2006-01-02T15:04:05.000000000Z"`, as containerd writes it.
fn push_time(line: &mut String, time: SystemTime) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil_from_days(days);
    let _ = write!(
        line,
        "time=\"{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z\"",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    );
}

/// The Gregorian date of a day counted from 1970-01-01. Years are counted from March, so that the
/// leap day is a year's last.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::io::Read;
    use std::time::Instant;

    fn fifo() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        (dir, path)
    }

    fn say(logger: &Logger, text: &str) {
        logger.log(&Record::builder().level(Level::Error).args(format_args!("{text}")).build());
    }

    fn reader(path: &Path) -> File {
        OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).unwrap()
    }

    /// Reads until `marker` was seen, at most five seconds.
    fn read_until(file: &mut File, marker: &str) -> String {
        let begin = Instant::now();
        let mut text = String::new();
        let mut buffer = [0; 65536];
        while !text.contains(marker) {
            assert!(begin.elapsed() < Duration::from_secs(5), "no {marker:?} in {text:?}");
            match file.read(&mut buffer) {
                Ok(n) if n > 0 => text.push_str(&String::from_utf8_lossy(&buffer[..n])),
                _ => thread::sleep(Duration::from_millis(2)),
            }
        }
        text
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000000Z"),
            (4_102_444_800, "2100-01-01T00:00:00.000000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000000Z"),
        ] {
            let mut line = String::new();
            push_time(&mut line, UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(line, format!("time=\"{text}\""));
        }
    }

    fn line_of(args: std::fmt::Arguments<'_>, key_values: &dyn kv::Source) -> String {
        let record =
            Record::builder().level(Level::Warn).args(args).key_values(&key_values).build();
        format_line(UNIX_EPOCH, &record, " id=c1")
    }

    #[test]
    fn a_line_has_time_level_message_and_fields() {
        let key_values: &[(&str, &str)] = &[("vmid", "90001"), ("error", "a \"b\"\nlevel=error")];
        assert_eq!(
            line_of(format_args!("two\nlines"), &key_values),
            "time=\"1970-01-01T00:00:00.000000000Z\" level=warning msg=\"two\\nlines\" \
             vmid=90001 error=\"a \\\"b\\\"\\nlevel=error\" id=c1\n"
        );
    }

    #[test]
    fn a_huge_record_is_cut_to_one_line() {
        let text = "ä".repeat(MAX_LINE);
        let line = line_of(format_args!("{text}"), &([] as [(&str, &str); 0]));
        assert!(line.len() <= MAX_LINE, "{}", line.len());
        assert!(line.ends_with("…\" id=c1\n"));
        assert_eq!(line.lines().count(), 1);
    }

    #[test]
    fn levels_are_containerds_words() {
        assert_eq!(parse_level("WARNING"), Some(LevelFilter::Warn));
        assert_eq!(parse_level("debug"), Some(LevelFilter::Debug));
        assert_eq!(parse_level("loud"), None);
    }

    #[test]
    fn lines_written_before_there_is_a_reader_are_kept_for_it() {
        let (_dir, path) = fifo();
        let logger = Logger::open(&path, &[("id", "c1")]).unwrap();
        say(&logger, "early");
        assert!(logger.drain(Duration::from_secs(2)));
        let text = read_until(&mut reader(&path), "early");
        assert!(text.ends_with(" level=error msg=early id=c1\n"), "{text:?}");
    }

    #[test]
    fn a_reader_that_does_not_read_never_holds_up_the_caller_and_gets_the_count() {
        let (_dir, path) = fifo();
        let logger = Logger::open(&path, &[]).unwrap();
        let mut slow = reader(&path);
        let text = "x".repeat(1000);
        let begin = Instant::now();
        for _ in 0..QUEUE_LINES * 2 {
            say(&logger, &text);
        }
        assert!(begin.elapsed() < Duration::from_secs(1), "took {:?}", begin.elapsed());
        assert!(logger.dropped.load(Ordering::Relaxed) > 0);
        assert!(!logger.drain(Duration::from_millis(20)), "a full queue cannot drain");
        let text = read_until(&mut slow, "count=");
        assert!(text.contains("log lines were dropped"));
    }

    #[test]
    fn logging_resumes_when_the_reader_is_back() {
        let (_dir, path) = fifo();
        let logger = Logger::open(&path, &[]).unwrap();
        let mut first = reader(&path);
        say(&logger, "one");
        read_until(&mut first, "one");
        drop(first);
        say(&logger, "two");
        assert!(logger.drain(Duration::from_secs(2)), "a missing reader is no error");
        say(&logger, "three");
        let text = read_until(&mut reader(&path), "three");
        assert!(text.contains("msg=two"), "{text:?}");
    }

    #[test]
    fn a_plain_file_is_appended_to_and_a_missing_one_is_stderr() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        let logger = Logger::open(&path, &[]).unwrap();
        say(&logger, "after");
        assert!(logger.drain(Duration::from_secs(2)));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("before\ntime=") && text.ends_with("msg=after\n"), "{text:?}");
        assert!(matches!(Sink::open(&dir.path().join("none")).unwrap(), Sink::Stderr));
    }
}
