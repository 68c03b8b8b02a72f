//! Everything against real services: one binary, so that it is linked once and its tests share
//! one PostgreSQL. Each test has a database and a Redis of its own.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod accounts;
mod audit;
mod embedded;
mod engine;
mod events;
mod faults;
mod layers;
mod refusals;
mod rounds_end;
mod selling;
mod support;
mod writer;
