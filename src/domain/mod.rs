//! The pure core: words, values and rules. No I/O, no clock, no randomness.
//!
//! [`model`] is the executable specification of everything that the scripts in `lua/` own: the
//! property tests run random commands against it and against the real scripts, and compare
//! replies and state.

pub mod allowance;
pub mod audit_log;
pub mod cart;
pub mod demand;
pub mod durability;
pub mod hurdles;
pub mod id;
pub mod journal;
pub mod limits;
pub mod model;
pub mod money;
pub mod order;
pub mod payment;
pub mod proof;
pub mod receipt;
pub mod round;
pub mod schedule;
pub mod sealed;
