//! The Task service: its edge, and the containers it acts on.

pub mod stdio;
