//! What keeps a node honest: recovery and the auditor.

pub mod assess;
pub mod auditor;
pub mod recovery;
