//! Everything against real services: one binary, so that it is linked once and its tests share
//! one PostgreSQL. Each test has a database and a Redis of its own.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod accounts;
mod audit;
mod audit_log;
mod canary;
mod carts;
mod catalogue;
mod connections;
#[cfg(feature = "faults")]
mod crash;
mod documents;
mod durability;
mod embedded;
mod engine;
mod events;
mod faults;
mod fence;
mod gateways;
mod holds;
mod hurdles;
mod idempotency;
mod identity;
mod layers;
mod limits;
mod losses;
mod machine;
mod network;
mod outage;
mod own_events;
mod payments;
mod personal;
mod power;
mod privileges;
mod processes;
mod receipts;
mod refusals;
mod replica;
mod reports;
mod rounds_end;
mod schedules;
mod selling;
mod standby;
mod support;
mod torture;
mod writer;
