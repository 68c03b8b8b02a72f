//! What can be run: one file per scenario, which says only what is special about it.

pub(crate) mod drop;
pub(crate) mod outage;
