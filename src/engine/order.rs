//! One order by its id: `order.lua`.

use bytes::Bytes;

use super::{Engine, Shared, error::EngineError, reply::Reply};
use crate::domain::{id::OrderId, order::Order};

impl Engine {
    /// The order with this id, as it is now; `None` when Redis has no such order.
    ///
    /// # Errors
    /// [`EngineError`]; nothing is ever changed.
    pub async fn order(&self, id: OrderId) -> Result<Option<Order>, EngineError> {
        let Shared {
            keys,
            scripts,
            view,
            ..
        } = &*self.shared;
        let (epoch, caller) = view.caller()?;
        let names = vec![keys.meta(), keys.sale(id.sale()), keys.orders(id.sale())];
        let arguments = vec![caller, Bytes::copy_from_slice(id.0.as_bytes())];
        let reply = self.reads.call(&scripts.order, names, arguments).await?;
        let mut reply = Reply::new("order", reply);
        view.admit(epoch, &mut reply)?;
        reply.record(id)
    }
}
