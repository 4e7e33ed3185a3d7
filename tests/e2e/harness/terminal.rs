//! A terminal for `ctr`, as script(1) would give it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use super::{process, sys};

/// A command on a pseudo-terminal of its own. Carriage returns are dropped from what it prints:
/// `ctr` leaves the translation of line ends on, so they come doubled.
pub struct Terminal {
    child: Child,
    master: File,
    screen: Arc<(Mutex<Vec<u8>>, Condvar)>,
}

impl Terminal {
    pub fn spawn(mut command: Command, rows: u16, columns: u16) -> Terminal {
        let (master, slave): (OwnedFd, OwnedFd) = sys::openpty(rows, columns);
        let copy = || slave.try_clone().expect("clone the terminal");
        command.stdin(copy()).stdout(copy()).stderr(copy());
        sys::with_controlling_terminal(&mut command);
        let child = command.spawn().expect("cannot run the command on a terminal");
        drop(command);
        drop(slave);
        let master = File::from(master);
        let screen = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let (mut reader, shared) = (master.try_clone().expect("clone the master"), screen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0u8; 4096];
            // EIO when the last slave is closed.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let printed = buffer[..count].iter().filter(|byte| **byte != b'\r');
                shared.0.lock().expect("not poisoned").extend(printed);
                shared.1.notify_all();
            }
        });
        Terminal { child, master, screen }
    }

    /// Types on the keyboard.
    pub fn send(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("write to the terminal");
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        sys::set_window_size(&self.master, rows, columns);
    }

    /// All that was printed so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.0.lock().expect("not poisoned")).into_owned()
    }

    /// Waits until `text` has been printed.
    #[track_caller]
    pub fn expect(&self, text: &str) {
        let end = process::deadline(Duration::from_secs(15));
        let mut bytes = self.screen.0.lock().expect("not poisoned");
        while !String::from_utf8_lossy(&bytes).contains(text) {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                panic!("the terminal never showed {text:?}: {:?}", String::from_utf8_lossy(&bytes));
            };
            bytes = self.screen.1.wait_timeout(bytes, left).expect("not poisoned").0;
        }
    }

    /// The command's exit code.
    #[track_caller]
    pub fn wait(mut self) -> i32 {
        let status = process::wait_child(&mut self.child, Duration::from_secs(30));
        let Some(status) = status else {
            let _ = self.child.kill();
            panic!("the command on the terminal did not end: {:?}", self.screen());
        };
        status.code().unwrap_or(-1)
    }
}
