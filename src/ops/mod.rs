//! What keeps a node honest: recovery, the auditor, the end of rounds, and short journals.

pub mod assess;
pub mod auditor;
pub mod certificate;
pub mod ending;
pub mod recovery;
pub mod trimming;
