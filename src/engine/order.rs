//! One order by its id: `order.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError};
use crate::domain::{id::OrderId, order::Order};

impl Engine {
    /// The order with this id, as it is now; `None` when Redis has no such order.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed.
    pub async fn order(&self, id: OrderId) -> Result<Option<Order>, EngineError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![keys.meta(), keys.sale(id.sale()), keys.orders(id.sale())];
        let arguments = vec![Bytes::copy_from_slice(id.0.as_bytes())];
        let mut called = self
            .shared
            .call(&self.reads, &scripts.order, names, arguments)
            .await?;
        called.reply.record(id)
    }
}
