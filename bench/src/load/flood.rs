//! As many requests as a server takes: every connection sends its next one as soon as it has the
//! last answer. For servers that do not sell, or not by our API.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::crowd::Arrival;
use super::outcome::judge_plainly;
use super::sender::{Load, Pool, Record, Requests, Sending};
use crate::host;

/// What a flood is like.
pub(crate) struct Flood {
    pub(crate) load: Load,
    pub(crate) requests: Requests,
    /// Requests; each has a key of its own and the next buyer.
    pub(crate) count: usize,
    /// Buyers that the requests have tokens of.
    pub(crate) buyers: usize,
}

/// What came of a flood.
pub(crate) struct Flooded {
    /// In the order in which they were to be sent. What was refused has the status as its code.
    pub(crate) records: Vec<Record>,
    /// Connections that stood.
    pub(crate) connections: usize,
    /// From the first request to the last answer.
    pub(crate) wall: Duration,
    /// Processor time of the harness meanwhile.
    pub(crate) cpu: Duration,
}

impl Flood {
    /// Sends it.
    ///
    /// # Errors
    ///
    /// No connection could be opened.
    pub(crate) async fn run(self) -> Result<Flooded> {
        let pool = Pool::open(&self.load).await?;
        let connections = pool.opened;
        let arrival = |n| Arrival {
            buyer: n % self.buyers,
            key: n,
            sale: 0,
            due: Duration::ZERO,
        };
        let (opening, cpu) = (Instant::now(), host::cpu_time());
        let sending = Sending {
            requests: Arc::new(self.requests),
            plan: (0..self.count).map(arrival).collect(),
            judge: judge_plainly,
            opening,
        };
        let sent = pool.run(Arc::new(sending), Arc::default()).await?;
        Ok(Flooded {
            wall: opening.elapsed(),
            cpu: host::cpu_time().saturating_sub(cpu),
            records: sent.records,
            connections,
        })
    }
}
