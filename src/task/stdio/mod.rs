//! A process's stdin, stdout and stderr.
//!
//! Descriptors go straight to the process where that is possible: what it writes is then copied by
//! nobody between it and containerd. The shim only *holds* each FIFO, so that containerd's end may
//! come and go: an output FIFO by a descriptor that is open for reading too (a writer without a reader
//! would get SIGPIPE), stdin by a writer of its own until `CloseIO` (a reader without a writer would
//! get an end of file). While nobody reads, writers block when the pipe is full. Terminals are copied.
//!
//! The output FIFOs of an exec are the exception: the process gets a pipe, and the shim moves what comes
//! out of it (see `relay`). An exec may leave processes behind that inherit its output (`sh -c 'server &'`);
//! with the FIFO itself in their hands the client would wait for its end of file until the last of them
//! is gone. So the exit of an exec is seen as soon as its own output has been delivered and those others
//! have been silent for a moment; from then on they get `EPIPE` and `SIGPIPE`, as they do with runc's shim.
//! The container's first process leaves nobody behind: its pid namespace dies with it, and without one
//! of its own the shim kills what is left in the cgroup before the exit is seen. It needs no detour.
//!
//! Files of the host (`file://`) are never given to a process: it gets a pipe, from which the shim
//! copies, because through the descriptor of a log it could change the log and its mode.
//!
//! Nothing here blocks the runtime: a FIFO is opened through a descriptor that already has both ends,
//! regular files on the blocking pool.

mod logger;
mod relay;
mod terminal;
mod uri;

use std::fs::{DirBuilder, File, OpenOptions};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::warn;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Uid, fchown};
use tokio::net::unix::pipe;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use logger::Logger;
use relay::Relay;

use crate::sys;
use terminal::{Reader, Terminal, Writer, set_nonblocking};
use uri::Stream;

/// How often a FIFO of an ended process is looked at, at first and in the end.
const RELEASE_POLL: Duration = Duration::from_millis(1);
const RELEASE_POLL_MAX: Duration = Duration::from_millis(50);

/// How long an ended process's output may wait for a client that has not read it yet. Once the end is
/// known that client deletes the process, and gives up opening the FIFO if it has not come to that.
const READ_LIMIT: Duration = Duration::from_secs(2);

/// What can go wrong with stdio.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a form that is known.
    #[error("stdio URI {uri:?} {reason}")]
    Uri { uri: String, reason: &'static str },
    /// stdin can only be read from a path.
    #[error("stdin cannot come from {uri:?}: it must be a FIFO")]
    Stdin { uri: String },
    /// A FIFO or file.
    #[error("open {stream} {}: {}", path.display(), text(source))]
    Open { stream: &'static str, path: PathBuf, source: io::Error },
    /// The logging program could not be executed.
    #[error("start logging program {}: {}", program.display(), text(source))]
    StartLogger { program: PathBuf, source: io::Error },
    /// It ran, but never was ready.
    #[error("logging program {} did not become ready: {reason}", program.display())]
    LoggerNotReady { program: PathBuf, reason: String },
    /// The terminal's master could not be watched, or resized.
    #[error("terminal: {}", text(.0))]
    Terminal(#[source] io::Error),
    /// The process has no terminal.
    #[error("the process has no terminal")]
    NoTerminal,
}

fn text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => Errno::from_raw(code).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// The streams of a Create or Exec request, as they are there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioRequest {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// Whose streams they are: loggers want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    pub container_id: String,
    /// `None` for the container's first process, whose output FIFOs are not relayed.
    pub exec_id: Option<String>,
    pub namespace: String,
    /// The logger's working directory, as containerd's shim has it.
    pub bundle: PathBuf,
}

/// The open streams of one process.
///
/// In the order of a process's life: [`Self::open`]; [`Self::child_fds`] or, with a terminal,
/// [`Self::attach_terminal`]; [`Self::close_stdin`] at `CloseIO`; [`Self::drain`] once the process has
/// ended; [`Self::finish`] once its exit has been published. Dropping it at any point closes everything
/// and lets loggers end.
#[derive(Debug, Default)]
pub struct Stdio {
    terminal: bool,
    child: Option<[OwnedFd; 3]>,
    pending: Option<Pending>,
    copied: Option<Terminal>,
    /// `(columns, rows)` of a resize that came before the terminal.
    size: Option<(u16, u16)>,
    stdin_hold: Option<OwnedFd>,
    output_holds: Vec<OwnedFd>,
    /// Those of an ended process that still wait for their reader.
    releases: JoinSet<()>,
    relays: Vec<Relay>,
    loggers: Vec<Logger>,
}

/// A terminal's streams until there is the terminal.
struct Pending {
    input: Option<Reader>,
    output: Option<Writer>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

/// An output stream that has been opened.
#[derive(Debug)]
struct Output {
    /// Blocking, for the workload.
    fd: OwnedFd,
    /// A FIFO or pipe, which the reactor can watch.
    pipe: bool,
}

impl Stdio {
    /// Opens all streams; with a logger, returns when that is ready (10 s at most).
    ///
    /// # Errors
    /// [`Error`]; nothing stays open, and no logger stays.
    pub async fn open(request: &StdioRequest, context: &Context) -> Result<Self, Error> {
        let mut stdio = Self { terminal: request.terminal, ..Self::default() };
        let stdin = stdio.open_stdin(&request.stdin)?;
        let (stdout, stderr) = stdio.open_outputs(request, context).await?;
        if request.terminal {
            stdio.pending = Some(Pending {
                input: stdin.map(reader).transpose().map_err(Error::Terminal)?,
                output: stdout.map(writer).transpose().map_err(Error::Terminal)?,
            });
        } else {
            stdio.child = Some([
                match stdin {
                    Some(input) => input.fd,
                    None => null("stdin", false)?,
                },
                match stdout {
                    Some(output) => output.fd,
                    None => null("stdout", true)?,
                },
                match stderr {
                    Some(output) => output.fd,
                    None => null("stderr", true)?,
                },
            ]);
        }
        Ok(stdio)
    }

    /// The process's descriptors 0, 1 and 2, once; `None` with a terminal. The caller closes them when
    /// they have been sent: while the shim has a copy, no reader sees an end of file.
    #[must_use]
    pub fn child_fds(&mut self) -> Option<[OwnedFd; 3]> {
        self.child.take()
    }

    /// Makes the process's pipes a user's, so that it can open `/dev/stdout`: what init does otherwise,
    /// but root of a user namespace may not. Best effort, as in runc.
    pub fn give(&self, uid: u32) {
        for fd in self.child.iter().flatten() {
            let kind = fstat(fd).map(|file| SFlag::from_bits_truncate(file.st_mode & libc::S_IFMT));
            if matches!(kind, Ok(SFlag::S_IFIFO | SFlag::S_IFSOCK)) {
                let _ = fchown(fd, Some(Uid::from_raw(uid)), None);
            }
        }
    }

    /// Whether the request asked for a terminal.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Begins to copy between the streams and the terminal that init has opened.
    ///
    /// # Errors
    /// [`Error::NoTerminal`] if none was asked for, or there is one already; [`Error::Terminal`].
    pub fn attach_terminal(&mut self, master: OwnedFd) -> Result<(), Error> {
        let pending = self.pending.take().ok_or(Error::NoTerminal)?;
        let terminal =
            Terminal::start(master, pending.input, pending.output).map_err(Error::Terminal)?;
        if let Some((columns, rows)) = self.size {
            terminal.resize(columns, rows).map_err(Error::Terminal)?;
        }
        self.copied = Some(terminal);
        Ok(())
    }

    /// `ResizePty`, in characters. Without a terminal it does nothing, as containerd expects; before
    /// [`Self::attach_terminal`] it is remembered.
    ///
    /// # Errors
    /// [`Error::Terminal`].
    pub fn resize(&mut self, columns: u32, rows: u32) -> Result<(), Error> {
        let bounded = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let (columns, rows) = (bounded(columns), bounded(rows));
        self.size = Some((columns, rows));
        match &self.copied {
            Some(terminal) => terminal.resize(columns, rows).map_err(Error::Terminal),
            None => Ok(()),
        }
    }

    /// `CloseIO`: the process sees an end of file once the client's end is closed too and everything
    /// written has been read.
    pub fn close_stdin(&mut self) {
        self.stdin_hold = None;
    }

    /// Call it when the process has ended. The future, which borrows nothing, is done when all output has
    /// been passed on: a terminal's to the last byte, a relayed stream's until nobody has written for 100 ms
    /// if others have it open, and until loggers and the readers of FIFOs have read everything (for at
    /// most 2 s). After `bound` it gives up: some other process still
    /// has the terminal open, or goes on writing, or nobody reads.
    pub fn drain(&mut self, bound: Duration) -> impl Future<Output = ()> + Send + 'static + use<> {
        // A logger or a relay would wait for the end of these.
        self.child = None;
        self.pending = None;
        let terminal = self.copied.as_mut().and_then(Terminal::take_output);
        let relays = self.relays.iter_mut().filter_map(Relay::ended);
        let copies: Vec<_> = terminal.into_iter().chain(relays).collect();
        let loggers: Vec<_> = self.loggers.iter_mut().map(|logger| logger.done(bound)).collect();
        // Too many open files: as if nobody read.
        let fifos: Vec<_> = self.output_holds.iter().flat_map(OwnedFd::try_clone).collect();
        async move {
            let all = async {
                for copy in copies {
                    // An error means that it was aborted by `finish`.
                    let _ = copy.await;
                }
                for done in loggers {
                    done.await;
                }
            };
            if timeout(bound, all).await.is_err() {
                warn!("output is still open {} s after the process has ended", bound.as_secs());
            }
            let read = async {
                for fifo in &fifos {
                    until_read(fifo).await;
                }
            };
            let _ = timeout(bound.min(READ_LIMIT), read).await;
        }
    }

    /// Releases everything: readers see the end of file, loggers get SIGTERM (and SIGKILL 12 s later,
    /// which nobody waits for). Call it when the exit has been published; again does nothing.
    ///
    /// What a reader has not read yet stays for it, also if it opens the FIFO only now, until this is
    /// dropped.
    pub fn finish(&mut self) {
        let mut releases = std::mem::take(&mut self.releases);
        for hold in std::mem::take(&mut self.output_holds) {
            releases.spawn(release(hold));
        }
        *self = Self { terminal: self.terminal, releases, ..Self::default() };
    }

    fn open_stdin(&mut self, uri: &str) -> Result<Option<Output>, Error> {
        let path = match Stream::parse(uri)? {
            Stream::Null => return Ok(None),
            Stream::Path(path) => path,
            Stream::File(_) | Stream::Logger(_) => {
                return Err(Error::Stdin { uri: uri.to_owned() });
            }
        };
        let error = |source| Error::Open { stream: "stdin", path: path.clone(), source };
        if !is_fifo(&path).map_err(error)? {
            // The process could write to a file that it was given to read (`/proc/self/fd/0`).
            return Err(Error::Stdin { uri: uri.to_owned() });
        }
        // With both ends open, neither of the next two waits or fails.
        let both = open(&path, OpenOptions::new().read(true).write(true), libc::O_NONBLOCK)
            .map_err(error)?;
        let fd = open(&path, OpenOptions::new().read(true), libc::O_NONBLOCK).map_err(error)?;
        set_nonblocking(&fd, false).map_err(error)?;
        // Write only: a hold that could read would keep the client from seeing that the process
        // has gone.
        let hold = open(&path, OpenOptions::new().write(true), libc::O_NONBLOCK).map_err(error)?;
        drop(both);
        self.stdin_hold = Some(hold);
        Ok(Some(Output { fd, pipe: true }))
    }

    async fn open_outputs(
        &mut self,
        request: &StdioRequest,
        context: &Context,
    ) -> Result<(Option<Output>, Option<Output>), Error> {
        let stdout = Stream::parse(&request.stdout)?;
        let stderr = Stream::parse(&request.stderr)?;
        // A logger of stdout is one program for both streams, as containerd's shim has it, and a
        // file is for both unless stderr names something else.
        let both = match &stdout {
            Stream::Logger(program) => {
                let (logger, input) = Logger::start(program, context).await?;
                self.loggers.push(logger);
                let stdout = Output { fd: input.stdout, pipe: true };
                let stderr = Output { fd: input.stderr, pipe: true };
                Some((stdout, stderr))
            }
            Stream::File(path) if matches!(stderr, Stream::Null) || stderr == stdout => {
                let file = open_log("stdout", path.clone()).await?;
                let error = |source| Error::Open { stream: "stdout", path: path.clone(), source };
                // One pipe for both, so that their lines stay in the order they were written.
                let stdout = self.file_output("stdout", file).map_err(error)?;
                let fd = stdout.fd.try_clone().map_err(error)?;
                let stderr = Output { fd, pipe: stdout.pipe };
                Some((stdout, stderr))
            }
            _ => None,
        };
        if let Some((stdout, stderr)) = both {
            return Ok((Some(stdout), (!request.terminal).then_some(stderr)));
        }
        let stdout = self.open_output("stdout", stdout, context).await?;
        if request.terminal {
            return Ok((stdout, None));
        }
        let stderr = self.open_output("stderr", stderr, context).await?;
        Ok((stdout, stderr))
    }

    async fn open_output(
        &mut self,
        stream: &'static str,
        target: Stream,
        context: &Context,
    ) -> Result<Option<Output>, Error> {
        let path = match target {
            Stream::Null => return Ok(None),
            Stream::Path(path) => path,
            Stream::File(path) => {
                let file = open_log(stream, path.clone()).await?;
                let error = |source| Error::Open { stream, path, source };
                return self.file_output(stream, file).map(Some).map_err(error);
            }
            Stream::Logger(program) => {
                // Of stderr alone, as stdout has been dealt with: it gets its own stream.
                let (logger, input) = Logger::start(&program, context).await?;
                self.loggers.push(logger);
                return Ok(Some(Output { fd: input.stderr, pipe: true }));
            }
        };
        let error = |source| Error::Open { stream, path: path.clone(), source };
        if !is_fifo(&path).map_err(error)? {
            let file =
                open(&path, OpenOptions::new().append(true), libc::O_NOCTTY).map_err(error)?;
            return self.file_output(stream, file).map(Some).map_err(error);
        }
        let hold = open(&path, OpenOptions::new().read(true).write(true), libc::O_NONBLOCK)
            .map_err(error)?;
        let fd = open(&path, OpenOptions::new().write(true), libc::O_NONBLOCK).map_err(error)?;
        self.output_holds.push(hold);
        if context.exec_id.is_some() && !self.terminal {
            let (relay, fd) = Relay::to_fifo(stream, fd).map_err(error)?;
            self.relays.push(relay);
            return Ok(Some(Output { fd, pipe: true }));
        }
        set_nonblocking(&fd, false).map_err(error)?;
        Ok(Some(Output { fd, pipe: true }))
    }
}

impl Stdio {
    /// A file of the host as an output: copied by the shim, never given to the process.
    fn file_output(&mut self, stream: &'static str, file: OwnedFd) -> io::Result<Output> {
        if self.terminal {
            return Ok(Output { fd: file, pipe: false });
        }
        let (relay, fd) = Relay::to_file(stream, file)?;
        self.relays.push(relay);
        Ok(Output { fd, pipe: true })
    }
}

/// Lets go of an output FIFO once its reader has everything.
///
/// A FIFO that nobody has open forgets its content, and a client may open its end after a short
/// process has ended. So the hold, which is a reader too, stays while there are bytes in it; and a
/// writer stays until somebody reads, because a client that opens the FIFO blocking would wait for one.
async fn release(hold: OwnedFd) {
    until_read(&hold).await;
    let path = PathBuf::from(format!("/proc/self/fd/{}", hold.as_raw_fd()));
    let Ok(writer) = open(&path, OpenOptions::new().write(true), libc::O_NONBLOCK) else { return };
    drop(hold);
    let mut pause = RELEASE_POLL;
    while has_no_reader(&writer) {
        sleep(pause).await;
        pause = (pause * 2).min(RELEASE_POLL_MAX);
    }
}

async fn until_read(fifo: &OwnedFd) {
    let mut pause = RELEASE_POLL;
    while pipe_holds_bytes(fifo) {
        sleep(pause).await;
        pause = (pause * 2).min(RELEASE_POLL_MAX);
    }
}

fn pipe_holds_bytes(pipe: &OwnedFd) -> bool {
    sys::pipe::bytes_waiting(pipe.as_fd()).is_ok_and(|waiting| waiting > 0)
}

/// poll(2): a pipe's writer has `POLLERR` while nobody has the other end open.
fn has_no_reader(writer: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}

fn is_fifo(path: &Path) -> io::Result<bool> {
    Ok(path.metadata()?.file_type().is_fifo())
}

fn open(path: &Path, options: &mut OpenOptions, flags: i32) -> io::Result<OwnedFd> {
    options.custom_flags(flags).open(path).map(OwnedFd::from)
}

fn null(stream: &'static str, write: bool) -> Result<OwnedFd, Error> {
    let path = Path::new("/dev/null");
    open(path, OpenOptions::new().read(!write).write(write), 0).map_err(|source| Error::Open {
        stream,
        path: path.to_owned(),
        source,
    })
}

/// A log file, with its parents. On the blocking pool: it may lie on a slow disk or on the network.
async fn open_log(stream: &'static str, path: PathBuf) -> Result<OwnedFd, Error> {
    let for_error = path.clone();
    let opened = tokio::task::spawn_blocking(move || {
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        open(&path, OpenOptions::new().append(true).create(true).mode(0o644), libc::O_NOCTTY)
    })
    .await
    .unwrap_or_else(|join| Err(io::Error::other(join)));
    opened.map_err(|source| Error::Open { stream, path: for_error, source })
}

fn reader(input: Output) -> io::Result<Reader> {
    Ok(if input.pipe {
        Box::new(pipe::Receiver::from_owned_fd(input.fd)?)
    } else {
        Box::new(tokio::fs::File::from_std(File::from(input.fd)))
    })
}

fn writer(output: Output) -> io::Result<Writer> {
    Ok(if output.pipe {
        Box::new(pipe::Sender::from_owned_fd(output.fd)?)
    } else {
        Box::new(tokio::fs::File::from_std(File::from(output.fd)))
    })
}

#[cfg(test)]
mod tests;
