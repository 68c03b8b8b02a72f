//! What can be run: one file per scenario, which says only what is special about it.

pub(crate) mod baselines;
pub(crate) mod canonical;
pub(crate) mod drain;
pub(crate) mod drop;
pub(crate) mod floor;
pub(crate) mod herd;
pub(crate) mod hold_pay_expire;
pub(crate) mod ladder;
pub(crate) mod login_flood;
pub(crate) mod login_timing;
pub(crate) mod many_sales;
pub(crate) mod outage;
pub(crate) mod retry_storm;
pub(crate) mod scale;
pub(crate) mod soak;
pub(crate) mod soldout;
pub(crate) mod sse;
pub(crate) mod suite;
