//! The phases of a process and the table of the moves between them.

use std::fmt;

/// Where a process (the container's init or an exec) stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The CT is being made; only the init process has this phase.
    Creating,
    /// It may be started. For an exec: known, nothing runs yet.
    Created,
    /// The program is being executed.
    Starting,
    Running,
    /// It has ended, or could not be executed.
    Stopped,
    /// Its traces are being removed.
    Deleting,
    Deleted,
}

/// Every legal move. What is not here is refused with [`Illegal`].
const MOVES: &[(Phase, Phase)] = &[
    (Phase::Creating, Phase::Created),
    // Creating failed or was given up: everything has been undone.
    (Phase::Creating, Phase::Deleted),
    (Phase::Created, Phase::Starting),
    // It was killed, or the CT was stopped, before it was started.
    (Phase::Created, Phase::Stopped),
    // A task that was never started may be deleted; it is killed first.
    (Phase::Created, Phase::Deleting),
    (Phase::Starting, Phase::Running),
    // It could not be executed, or ended before that was known.
    (Phase::Starting, Phase::Stopped),
    (Phase::Running, Phase::Stopped),
    (Phase::Stopped, Phase::Deleting),
    // Proxmox could not destroy the CT; the client may try again.
    (Phase::Deleting, Phase::Stopped),
    (Phase::Deleting, Phase::Deleted),
];

/// A move that the table does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot go from {from} to {to}")]
pub struct Illegal {
    pub from: Phase,
    pub to: Phase,
}

impl Phase {
    /// Moves to `to`.
    ///
    /// # Errors
    /// [`Illegal`] if the table does not list the move; the phase is unchanged then.
    pub fn advance(&mut self, to: Phase) -> Result<(), Illegal> {
        if MOVES.contains(&(*self, to)) {
            *self = to;
            Ok(())
        } else {
            Err(Illegal { from: *self, to })
        }
    }

    /// Whether signals can reach it.
    #[must_use]
    pub fn is_alive(self) -> bool {
        matches!(self, Self::Created | Self::Starting | Self::Running)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Phase; 7] = [
        Phase::Creating,
        Phase::Created,
        Phase::Starting,
        Phase::Running,
        Phase::Stopped,
        Phase::Deleting,
        Phase::Deleted,
    ];

    #[test]
    fn only_the_listed_moves_are_legal() {
        for from in ALL {
            for to in ALL {
                let mut phase = from;
                let result = phase.advance(to);
                if MOVES.contains(&(from, to)) {
                    assert_eq!((result, phase), (Ok(()), to));
                } else {
                    assert_eq!((result, phase), (Err(Illegal { from, to }), from));
                }
            }
        }
    }

    #[test]
    fn a_second_start_and_a_second_delete_are_refused() {
        let mut phase = Phase::Created;
        phase.advance(Phase::Starting).unwrap();
        assert!(phase.advance(Phase::Starting).is_err());
        phase.advance(Phase::Stopped).unwrap();
        phase.advance(Phase::Deleting).unwrap();
        assert!(phase.advance(Phase::Deleting).is_err());
    }
}
