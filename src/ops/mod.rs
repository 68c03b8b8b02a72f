//! What keeps a node honest: recovery and the auditor.

pub mod auditor;
pub mod recovery;
