//! The generator: who comes and when, with what token, over which connection, and what an answer
//! means.

pub(crate) mod audience;
mod connection;
pub(crate) mod crowd;
pub(crate) mod flood;
pub(crate) mod outcome;
pub(crate) mod pulse;
pub(crate) mod sender;
pub(crate) mod tokens;
