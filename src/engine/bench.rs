//! What `benches/micro.rs` measures of the engine's inside; in no other build.
#![expect(clippy::unwrap_used, reason = "a benchmark may fail")]

use std::{fmt, sync::Arc};

use bytes::Bytes;
use fred::types::Value;
use futures::future::join_all;
use uuid::Uuid;

use super::{
    coalescer::{Coalescer, Lane},
    error::EngineError,
    journal,
    packed::{self, VERSION, push_item},
    purchase,
    reply::Reply,
};
use crate::domain::{
    id::{BuyerId, Epoch, Fingerprint, OrderId, RoundId, SaleNumber},
    money::{Currency, Money},
    order::{Durability, Order, Purchase, Status},
};

const SALE: SaleNumber = SaleNumber(1);

/// Some purchases, different ones.
pub fn purchases(count: u32) -> Vec<Purchase> {
    let purchase = |n: u32| {
        let buyer = BuyerId(Uuid::from_u128(n.into()));
        Purchase {
            round: RoundId {
                sale: SALE,
                round: 1,
            },
            order: OrderId::derive(SALE, buyer, "key"),
            buyer,
            quantity: 1,
            fingerprint: Fingerprint([7; 8]),
            durability: Durability::Fsync,
            redeem: false,
            archive: 0,
        }
    };
    (0..count).map(purchase).collect()
}

/// Packs purchases as the script gets them.
pub fn pack(purchases: &[Purchase]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for purchase in purchases {
        push_item(&mut bytes, 0, purchase);
    }
    bytes
}

/// The order that a purchase becomes, as the script writes it.
fn record(purchase: &Purchase, seq: u64) -> Vec<u8> {
    let euro = Currency::parse("EUR").unwrap();
    packed::record(&Order {
        id: purchase.order,
        round: purchase.round,
        buyer: purchase.buyer,
        quantity: purchase.quantity,
        unit_price: Money::new(1999, euro).unwrap(),
        status: Status::Confirmed,
        accepted_as: Status::Confirmed,
        durability: purchase.durability,
        receipt_key: 1,
        epoch: Epoch(1),
        seq,
        pseq: 9,
        accepted_at_ms: 1_764_000_000_000,
        fingerprint: purchase.fingerprint,
        hold_ms: 0,
        extended_ms: 0,
        returned: 0,
        refunded: 0,
    })
}

/// The decisions of one call, as they came from Redis.
#[derive(Clone)]
pub struct Decisions(Vec<Value>);

impl Decisions {
    /// All of them acceptances.
    pub fn accepted(purchases: &[Purchase]) -> Self {
        let words = purchases.iter().zip(1..).flat_map(|(purchase, seq)| {
            let record = Value::Bytes(record(purchase, seq).into());
            [Value::Bytes(Bytes::from_static(b"accepted")), record]
        });
        Self(words.collect())
    }

    /// Reads them.
    ///
    /// # Errors
    /// They are not what a script says.
    pub fn read(self, purchases: &[Purchase]) -> Result<u64, EngineError> {
        let mut reply = Reply::new("purchase", self.0);
        let mut accepted = 0;
        for purchase in purchases {
            accepted += u64::from(purchase::decision(&mut reply, purchase)?.is_ok());
        }
        Ok(accepted)
    }
}

/// An entry of the journal, as it came from Redis.
#[derive(Clone)]
pub struct JournalValue(Value);

impl JournalValue {
    /// With an acceptance of each purchase.
    pub fn new(purchases: &[Purchase]) -> Self {
        let mut counters = Vec::new();
        counters.extend(SALE.0.to_be_bytes());
        counters.extend(1_u32.to_be_bytes());
        for number in [100_u64, 90, 0, 10, 10] {
            counters.extend(&number.to_be_bytes()[2..]);
        }
        let orders = purchases.iter().zip(1..).flat_map(|(purchase, seq)| {
            let mut order = vec![0];
            order.extend(purchase.order.0.as_bytes());
            order.extend(record(purchase, seq));
            order
        });
        let fields: [(&str, Vec<u8>); 5] = [
            ("v", VERSION.to_string().into()),
            ("t", b"1764000000000".to_vec()),
            ("r", counters),
            ("o", orders.collect()),
            ("e", Vec::new()),
        ];
        let fields = fields
            .into_iter()
            .flat_map(|(name, value)| [Value::from(name), Value::Bytes(value.into())]);
        let entry = vec![Value::from("1-9"), Value::Array(fields.collect())];
        Self(Value::Array(entry))
    }

    /// Reads it; the orders in it, none if it is damaged.
    pub fn read(self) -> Option<usize> {
        Some(journal::raw_entry(self.0)?.entry.ok()?.orders.len())
    }
}

struct Echo;

impl Lane for Echo {
    type Item = Purchase;
    type Answer = OrderId;
    type Room = usize;

    fn fits(room: &mut usize, _: &Purchase) -> bool {
        *room += 1;
        *room <= 128
    }

    async fn call(&self, items: Vec<Purchase>) -> Result<Vec<OrderId>, EngineError> {
        Ok(items.into_iter().map(|item| item.order).collect())
    }
}

/// A coalescer whose calls cost nothing.
#[derive(Clone)]
pub struct Echoing(Arc<Coalescer<Echo>>);

impl fmt::Debug for Echoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Default for Echoing {
    fn default() -> Self {
        Self(Coalescer::new(Echo, 1 << 14, 4))
    }
}

impl Echoing {
    /// Has all purchases wait at the same time; how many got their own answer.
    pub async fn submit(&self, purchases: &[Purchase]) -> usize {
        let waiting = purchases.iter().map(|purchase| self.0.submit(*purchase));
        let answers = join_all(waiting).await;
        let own = answers
            .iter()
            .zip(purchases)
            .filter(|(answer, purchase)| answer.as_ref().is_ok_and(|id| *id == purchase.order));
        own.count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_measured_is_right() {
        let purchases = purchases(200);
        assert_eq!(pack(&purchases).len(), 200 * packed::ITEM_BYTES);
        assert_eq!(Decisions::accepted(&purchases).read(&purchases), Ok(200));
        assert_eq!(JournalValue::new(&purchases).read(), Some(200));
        assert_eq!(Echoing::default().submit(&purchases).await, 200);
    }
}
