//! The only Redis code.

pub mod journal;
