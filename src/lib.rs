//! Stockade: a Redis-first flash-sale engine.
//!
//! The folders are the architecture; a module imports only from layers below it:
//! `cli` → `app` `lifecycle` → `http` → `sales` → `writer` `realtime` `auth` `catalogue` `ops` `payments`
//! `embedded` `throttle` →
//! `engine` `store` → `config` `metrics` `readiness` `clock` → `domain`.
#![warn(missing_docs)]

pub mod app;
pub mod auth;
pub mod catalogue;
pub mod clock;
pub mod config;
pub mod domain;
pub mod embedded;
pub mod engine;
pub mod faults;
pub mod http;
pub mod lifecycle;
pub mod metrics;
pub mod ops;
pub mod payments;
pub mod readiness;
pub mod realtime;
pub mod sales;
pub mod store;
pub mod throttle;
pub mod writer;
