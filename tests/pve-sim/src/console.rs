//! Terminals of CTs: what `termproxy`, `dtach` and the websocket proxy are on a real node.
//!
//! A terminal is one program per CT, `lxc-console` or `lxc-attach`, which stays when its client goes
//! and which all clients share. Nothing is replayed to a new client.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::{broadcast, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::node::{Node, lock};
use crate::sys;
use crate::task::Task;
use crate::websocket::{Frame, Handshake, PONG, decode, encode};

const PORTS: std::ops::RangeInclusive<u16> = 5900..=5999;
/// Pieces of output that a slow client may be behind.
const BACKLOG: usize = 1024;
/// How long a client may take to say who it is.
const LOGIN: Duration = Duration::from_secs(10);
/// What dtach sends to a new client: it clears the screen.
const CLEAR: &[u8] = b"\x1b[H\x1b[J";

/// What a terminal program writes; an empty piece is its end.
type Output = broadcast::Receiver<Vec<u8>>;

/// A running terminal program.
#[derive(Debug)]
struct Session {
    master: Arc<AsyncFd<OwnedFd>>,
    output: broadcast::Sender<Vec<u8>>,
    stop: AbortHandle,
}

/// A port that waits for its client.
#[derive(Debug)]
struct Waiting {
    vmid: u32,
    client: oneshot::Sender<oneshot::Receiver<()>>,
}

/// The terminals of a node.
#[derive(Debug, Default)]
pub struct Terminals {
    sessions: Mutex<HashMap<u32, Arc<Session>>>,
    ports: Mutex<HashMap<u16, Option<Waiting>>>,
}

/// A port in use; free again when this goes.
#[derive(Debug)]
pub struct Port {
    node: Arc<Node>,
    /// Its number.
    pub number: u16,
}

impl Drop for Port {
    fn drop(&mut self) {
        lock(&self.node.terminals.ports).remove(&self.number);
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A client that was let in: where its terminal is, and what tells the task when it goes.
#[derive(Debug)]
pub struct Client {
    node: Arc<Node>,
    vmid: u32,
    /// `USER:TICKET`, which it must send first.
    login: String,
    /// How the protocol was changed.
    pub handshake: Handshake,
    _gone: oneshot::Sender<()>,
}

impl Node {
    /// Takes a free port for a terminal.
    pub fn reserve_port(self: &Arc<Self>) -> Option<Port> {
        let mut ports = lock(&self.terminals.ports);
        let number = PORTS.into_iter().find(|p| !ports.contains_key(p))?;
        ports.insert(number, None);
        Some(Port { node: self.clone(), number })
    }

    /// The command that shows the terminal of a CT, as a real node runs it.
    fn terminal_command(vmid: u32, cmode: &str) -> Vec<String> {
        let id = vmid.to_string();
        let words: &[&str] = match cmode {
            "console" => &["lxc-console", "-n", &id, "-t", "0", "-e", "-1"],
            "shell" => &["lxc-attach", "--clear-env", "-n", &id],
            _ => &["lxc-console", "-n", &id, "-e", "-1"],
        };
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    /// The body of the task of a terminal: it waits for a client, and until that has gone.
    pub async fn wait_for_client(
        self: Arc<Self>,
        task: Arc<Task>,
        vmid: u32,
        port: Port,
        cmode: String,
    ) -> Result<(), String> {
        let (client, connected) = oneshot::channel();
        lock(&self.terminals.ports).insert(port.number, Some(Waiting { vmid, client }));
        match timeout(self.profile.terminal_timeout(), connected).await {
            Ok(Ok(gone)) => {
                // It is never sent anything, only dropped.
                let _ = gone.await;
                Ok(())
            }
            _ => {
                task.log("failed waiting for client: timed out");
                Err(format!(
                    "command '/usr/bin/termproxy {} --path /vms/{vmid} --perm VM.Console \
                     --vncticket-endpoint --verify-port --ticket-fd 6 -- /usr/bin/dtach -A \
                     /var/run/dtach/vzctlconsole{vmid} -r winch -z {}' failed: exit code 1",
                    port.number,
                    Self::terminal_command(vmid, &cmode).join(" "),
                ))
            }
        }
    }

    /// Lets a client into the terminal that waits at a port. `None` if none does.
    pub fn take_terminal(
        self: &Arc<Self>,
        vmid: u32,
        port: u16,
        login: String,
        handshake: Handshake,
    ) -> Option<Client> {
        let mut ports = lock(&self.terminals.ports);
        let slot = ports.get_mut(&port)?;
        let waiting = slot.take_if(|w| w.vmid == vmid)?;
        let (gone, wait) = oneshot::channel();
        waiting.client.send(wait).ok()?;
        Some(Client { node: self.clone(), vmid, login, handshake, _gone: gone })
    }

    /// The terminal of a CT and its output from now on; it is started if there is none.
    fn session(self: &Arc<Self>, vmid: u32) -> io::Result<(Arc<Session>, Output)> {
        let mut sessions = lock(&self.terminals.sessions);
        if let Some(session) = sessions.get(&vmid) {
            return Ok((session.clone(), session.output.subscribe()));
        }
        let config = self.load(vmid).map_err(io::Error::other)?;
        let cmode = config.current.text("cmode").unwrap_or_else(|| "tty".into());
        let words = Self::terminal_command(vmid, &cmode);
        let (master, slave) = sys::open_pty()?;
        let stdio = || slave.try_clone().map(Stdio::from);
        // setsid makes the terminal the program's controlling one.
        let mut child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .args(&words)
            .arg("-P")
            .arg(&self.paths.lxc)
            .env("TERM", "xterm-256color")
            .stdin(stdio()?)
            .stdout(stdio()?)
            .stderr(stdio()?)
            .kill_on_drop(true)
            .spawn()?;
        drop(slave);
        let (output, receiver) = broadcast::channel(BACKLOG);
        let master = Arc::new(master);
        let (node, from, to) = (self.clone(), master.clone(), output.clone());
        let task = tokio::spawn(async move {
            while let Ok(bytes) = read_pty(&from).await {
                // Without a client it is lost.
                let _ = to.send(bytes);
            }
            // Nobody comes any more who would miss the end.
            lock(&node.terminals.sessions).remove(&vmid);
            let _ = to.send(b"\r\n[EOF - dtach terminating]\r\n".to_vec());
            let _ = to.send(Vec::new());
            let _ = child.wait().await;
        });
        let session = Arc::new(Session { master, output, stop: task.abort_handle() });
        sessions.insert(vmid, session.clone());
        Ok((session, receiver))
    }

    /// Ends all terminals.
    pub fn end_terminals(&self) {
        for (_, session) in lock(&self.terminals.sessions).drain() {
            session.stop.abort();
        }
    }
}

async fn read_pty(master: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut buffer = [0; 4096];
    loop {
        let mut ready = master.readable().await?;
        match ready.try_io(|fd| sys::read(fd, &mut buffer)) {
            // The last process has closed the other end.
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(n)) => return Ok(buffer[..n].to_vec()),
            Ok(Err(e)) => return Err(e),
            Err(_) => {}
        }
    }
}

async fn write_pty(master: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = master.writable().await?;
        match ready.try_io(|fd| sys::write(fd, bytes)) {
            Ok(Ok(n)) => bytes = &bytes[n..],
            Ok(Err(e)) => return Err(e),
            Err(_) => {}
        }
    }
    Ok(())
}

/// A message of the terminal's own protocol.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    /// `0:LENGTH:BYTES`
    Input(Vec<u8>),
    /// `1:COLUMNS:ROWS:`
    Resize(u16, u16),
    /// `2`
    KeepAlive,
}

/// Takes the first message from the buffer. `Err` if it can never become one.
fn take_message(buffer: &mut Vec<u8>) -> Result<Option<Message>, ()> {
    /// Digits up to a colon, as a number, and where the rest begins.
    fn number(bytes: &[u8], from: usize) -> Result<Option<(usize, usize)>, ()> {
        let rest = bytes.get(from..).unwrap_or_default();
        let end = rest.iter().position(|b| !b.is_ascii_digit());
        let text = std::str::from_utf8(&rest[..end.unwrap_or(rest.len())]).map_err(|_| ())?;
        if text.len() > 6 {
            return Err(());
        }
        match end {
            None => Ok(None),
            Some(end) if rest[end] == b':' => {
                Ok(Some((text.parse().map_err(|_| ())?, from + end + 1)))
            }
            Some(_) => Err(()),
        }
    }
    let (message, length) = match buffer.as_slice() {
        [] | [b'0' | b'1'] => return Ok(None),
        [b'2', ..] => (Message::KeepAlive, 1),
        [b'0', b':', ..] => {
            let Some((length, start)) = number(buffer, 2)? else { return Ok(None) };
            let Some(bytes) = buffer.get(start..start + length) else { return Ok(None) };
            (Message::Input(bytes.to_vec()), start + length)
        }
        [b'1', b':', ..] => {
            let Some((columns, next)) = number(buffer, 2)? else { return Ok(None) };
            let Some((rows, end)) = number(buffer, next)? else { return Ok(None) };
            let small = |n: usize| u16::try_from(n).map_err(|_| ());
            (Message::Resize(small(columns)?, small(rows)?), end)
        }
        _ => return Err(()),
    };
    buffer.drain(..length);
    Ok(Some(message))
}

impl Client {
    /// Passes bytes between the client and the terminal until one of them ends.
    pub async fn serve<S>(self, mut stream: S, mut received: Vec<u8>) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut data = Vec::new();
        let login = async {
            loop {
                if let Some(end) = data.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = data.drain(..=end).collect();
                    return Ok(line[..end] == *self.login.as_bytes());
                }
                if data.len() > 4096 || !next_data(&mut stream, &mut received, &mut data).await? {
                    return Ok::<_, io::Error>(false);
                }
            }
        };
        if !timeout(LOGIN, login).await.is_ok_and(|ok| ok.unwrap_or(false)) {
            return Ok(());
        }
        let (session, mut output) = self.node.session(self.vmid)?;
        stream.write_all(&encode(b"OK")).await?;
        stream.write_all(&encode(CLEAR)).await?;
        stream.flush().await?;
        // dtach asks the program to draw its screen again.
        sys::redraw(&session.master)?;
        loop {
            while let Some(message) =
                take_message(&mut data).map_err(|()| io::ErrorKind::InvalidData)?
            {
                match message {
                    Message::Input(bytes) => write_pty(&session.master, &bytes).await?,
                    Message::Resize(columns, rows) => {
                        sys::resize_pty(&session.master, columns, rows)?;
                    }
                    Message::KeepAlive => {}
                }
            }
            tokio::select! {
                more = next_data(&mut stream, &mut received, &mut data) => {
                    if !more? {
                        return Ok(());
                    }
                }
                bytes = output.recv() => match bytes {
                    Ok(bytes) if bytes.is_empty() => return Ok(()),
                    Ok(bytes) => {
                        stream.write_all(&encode(&bytes)).await?;
                        stream.flush().await?;
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                },
            }
        }
    }
}

/// Reads until there is more data, and answers pings. False at the end.
async fn next_data<S>(
    stream: &mut S,
    received: &mut Vec<u8>,
    data: &mut Vec<u8>,
) -> io::Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut chunk = [0; 4096];
    loop {
        match decode(received).map_err(|_| io::ErrorKind::InvalidData)? {
            Some(Frame::Data(bytes)) => {
                data.extend(bytes);
                return Ok(true);
            }
            Some(Frame::Ping) => {
                stream.write_all(&PONG).await?;
                stream.flush().await?;
            }
            Some(Frame::Close) => return Ok(false),
            Some(Frame::Other) => {}
            None => {
                // Dropped by a select, it has read nothing.
                let n = stream.read(&mut chunk).await?;
                if n == 0 {
                    return Ok(false);
                }
                received.extend_from_slice(&chunk[..n]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_understood_however_they_are_cut() {
        let all = b"1:80:24:0:6:id -u\n20:0:0:3:\xff:\n1:1:1:";
        for cut in 0..all.len() {
            let mut buffer = all[..cut].to_vec();
            let mut messages = Vec::new();
            for piece in [&b""[..], &all[cut..]] {
                buffer.extend_from_slice(piece);
                while let Some(message) = take_message(&mut buffer).unwrap() {
                    messages.push(message);
                }
            }
            assert_eq!(
                messages,
                [
                    Message::Resize(80, 24),
                    Message::Input(b"id -u\n".to_vec()),
                    Message::KeepAlive,
                    Message::Input(Vec::new()),
                    Message::Input(b"\xff:\n".to_vec()),
                    Message::Resize(1, 1),
                ],
                "{cut}"
            );
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for text in ["3", "0x", "0:x", "0:1234567:", "1:99999:1:", "0:-1:", "1:80;24:", "\n"] {
            assert_eq!(take_message(&mut text.as_bytes().to_vec()), Err(()), "{text}");
        }
    }
}
