//! What keeps a node honest: recovery.

pub mod recovery;
