//! Reads a script's reply, word by word; what it does not know is a protocol error.

use bytes::Bytes;
use fred::types::Value;

use super::{error::EngineError, packed::Standing, packed::Unpack};
use crate::domain::{
    id::{Epoch, OrderId},
    order::Order,
};

/// The parts of a reply, in order.
#[derive(Debug)]
pub(super) struct Reply {
    script: &'static str,
    parts: std::vec::IntoIter<Value>,
}

/// The head of every reply to a caller that was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Redis' clock, milliseconds since the Unix epoch.
    pub(super) now_ms: i64,
    /// The last journal entry.
    pub(super) pseq: u64,
}

impl Reply {
    pub(super) fn new(script: &'static str, parts: Vec<Value>) -> Self {
        Self {
            script,
            parts: parts.into_iter(),
        }
    }

    /// What this reply is missing or has instead.
    pub(super) fn unexpected(&self, what: &str) -> EngineError {
        EngineError::Protocol(format!("{}: {what}", self.script))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.len() == 0
    }

    pub(super) fn value(&mut self) -> Result<Value, EngineError> {
        self.parts
            .next()
            .ok_or_else(|| self.unexpected("too short"))
    }

    pub(super) fn bytes(&mut self) -> Result<Bytes, EngineError> {
        self.value()?
            .into_bytes()
            .ok_or_else(|| self.unexpected("not a string"))
    }

    pub(super) fn text(&mut self) -> Result<String, EngineError> {
        String::from_utf8(self.bytes()?.into()).map_err(|_| self.unexpected("not a word"))
    }

    pub(super) fn number<T: std::str::FromStr>(&mut self) -> Result<T, EngineError> {
        let text = self.text()?;
        text.parse()
            .map_err(|_| self.unexpected(&format!("{text:?} is not a number")))
    }

    /// A standing; `None` for a round that is missing or not whole.
    pub(super) fn standing(
        &mut self,
        epoch: Epoch,
        now_ms: i64,
    ) -> Result<Option<Standing>, EngineError> {
        let bytes = self.bytes()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let standing = Unpack(&bytes).standing(epoch, now_ms);
        standing
            .map(Some)
            .ok_or_else(|| self.unexpected("standing"))
    }

    /// An order's record; `None` when it is empty.
    pub(super) fn record(&mut self, id: OrderId) -> Result<Option<Order>, EngineError> {
        let bytes = self.bytes()?;
        if bytes.is_empty() {
            return Ok(None);
        }
        Unpack(&bytes)
            .order(id)
            .map(Some)
            .ok_or_else(|| self.unexpected("record"))
    }

    /// The sixteen bytes of an order's id.
    pub(super) fn order_id(&mut self) -> Result<OrderId, EngineError> {
        let bytes = self.bytes()?;
        let id = uuid::Uuid::from_slice(&bytes).map_err(|_| self.unexpected("order id"))?;
        Ok(OrderId(id))
    }
}
