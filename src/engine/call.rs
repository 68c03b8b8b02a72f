//! One script call of this node: let in, timed, and read up to its words.

use std::time::Instant;

use bytes::Bytes;
use fred::types::Value;

use super::{
    Shared,
    connection::Connection,
    error::EngineError,
    packed::Standing,
    reply::{Head, Reply},
    script::Script,
};
use crate::domain::id::Epoch;

/// The reply of a script that let this node in.
#[derive(Debug)]
pub(super) struct Called {
    /// What follows the head.
    pub(super) reply: Reply,
    /// The timeline that it belongs to.
    pub(super) epoch: Epoch,
    /// Redis' clock and its last entry.
    pub(super) head: Head,
    /// When it was sent.
    pub(super) sent_at: Instant,
}

impl Shared {
    /// Calls a script whose first argument is this node's view of the partition.
    pub(super) async fn call(
        &self,
        connection: &Connection,
        script: &Script,
        keys: Vec<String>,
        mut arguments: Vec<Bytes>,
    ) -> Result<Called, EngineError> {
        let (epoch, caller) = self.view.caller()?;
        arguments.insert(0, caller);
        let sent_at = Instant::now();
        let parts = connection.call(script, keys, arguments).await?;
        self.called(script, epoch, sent_at, parts)
    }

    /// The same, and then waits for replicas. Gives also how many of them have what it answered
    /// from: at least `replicas`, or fewer when they did not in time.
    pub(super) async fn call_replicated(
        &self,
        connection: &Connection,
        script: &Script,
        keys: &[String],
        mut arguments: Vec<Bytes>,
        replicas: u32,
    ) -> Result<(Called, u32), EngineError> {
        let (epoch, caller) = self.view.caller()?;
        arguments.insert(0, caller);
        let sent_at = Instant::now();
        let channel = self.keys.replicas();
        let (parts, acks) = connection
            .call_replicated(script, keys, &arguments, replicas, channel)
            .await?;
        Ok((self.called(script, epoch, sent_at, parts)?, acks))
    }

    fn called(
        &self,
        script: &Script,
        epoch: Epoch,
        sent_at: Instant,
        parts: Vec<Value>,
    ) -> Result<Called, EngineError> {
        let mut reply = Reply::new(script.name, parts);
        let head = self.view.admit(epoch, &mut reply)?;
        Ok(Called {
            reply,
            epoch,
            head,
            sent_at,
        })
    }

    /// Reads the standing that comes next in a reply, and remembers it.
    pub(super) fn learn_next(&self, called: &mut Called) -> Result<Standing, EngineError> {
        let standing = called
            .reply
            .standing(called.epoch, called.head.now_ms)?
            .ok_or_else(|| called.reply.unexpected("no standing"))?;
        self.learn(&standing, called.sent_at);
        Ok(standing)
    }
}
