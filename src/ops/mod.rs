//! What keeps a node honest: recovery, the auditor, the ends of holds and rounds, and short journals.

pub mod assess;
pub mod audit_log;
pub mod auditor;
pub mod certificate;
pub mod ending;
pub mod holds;
pub mod recovery;
pub mod trimming;
